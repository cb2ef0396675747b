"""model_stock against dense cosines, whole and filter by filter."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def updates() -> list[LowRank]:
    """Three that agree in part: a shared update and one of their own."""
    generator = torch.Generator().manual_seed(12)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = draw(2, 14), draw(11, 2)
    return [LowRank(torch.cat([a, draw(r, 14)]), torch.cat([b, draw(11, r)], dim=1), 0.5 + r) for r in (1, 3, 2)]


def merged(given, weights, **options) -> torch.Tensor:
    deltas = Deltas.of(given, weights, target="lin", dtype=torch.float64)
    return make_method("model_stock", options).merge(deltas, Context()).dense()


def ratio(vectors) -> float:
    """Of N vectors, from all ordered pairs."""
    count = len(vectors)
    found = [
        float(torch.nn.functional.cosine_similarity(vectors[n], vectors[m], dim=0))
        for n in range(count)
        for m in range(count)
        if n != m
    ]
    agreement = max(sum(found) / len(found), 0.0)
    return count * agreement / (1 + (count - 1) * agreement)


def test_it_is_the_dense_formula() -> None:
    dense = torch.stack([update.delta() for update in updates()])
    t = ratio(dense.flatten(1))
    assert 0.1 < t < 0.99
    assert_close(merged(updates(), (1.0, 1.0, 1.0)), t * dense.mean(dim=0), atol=1e-10, rtol=1e-10)


def test_two_adapters_have_the_ratio_of_the_paper() -> None:
    first, second = (update.delta() for update in updates()[:2])
    cosine = (first * second).sum() / (first.norm() * second.norm())
    expected = 2 * cosine / (1 + cosine) * (0.25 * first + 0.75 * second)
    assert_close(merged(updates()[:2], (1.0, 3.0)), expected, atol=1e-10, rtol=1e-10)


def test_filter_wise_every_row_has_its_own_ratio() -> None:
    dense = torch.stack([update.delta() for update in updates()])
    ratios = torch.tensor([ratio(dense[:, row]) for row in range(11)], dtype=torch.float64)
    assert len(ratios.unique()) > 8
    found = merged(updates(), (1.0, 1.0, 1.0), filter_wise=True)
    assert_close(found, ratios[:, None] * dense.mean(dim=0), atol=1e-10, rtol=1e-10)


def test_a_negative_weight_stands_for_the_negated_adapter_and_zero_for_none() -> None:
    first, second, third = updates()
    negated = LowRank(second.a, -second.b, second.scaling)
    for wise in (False, True):
        found = merged([first, negated, third], (1.0, -1.0, 0.0), filter_wise=wise)
        assert_close(found, merged([first, second], (1.0, 1.0), filter_wise=wise), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_parallel_opposite_and_zero_deltas_are_defined(filter_wise) -> None:
    first, second, _ = updates()
    negative = LowRank(first.a, -first.b, first.scaling)
    nothing = LowRank(second.a, 0 * second.b, 1.0)
    options = {"filter_wise": filter_wise}
    assert_close(merged([first, first, first], (1.0, 1.0, 1.0), **options), first.delta())
    assert not merged([first, negative], (1.0, 1.0), **options).any()
    assert not merged([first, nothing], (1.0, 1.0), **options).any()
    assert not merged([nothing], (1.0,), **options).any()


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="'model_stock' needs a weight that is not 0"):
        merged(updates(), (0.0, 0.0, 0.0))
