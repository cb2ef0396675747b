"""norm_match: the direction of the sum, the mean length of the parts."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def updates() -> list[LowRank]:
    generator = torch.Generator().manual_seed(13)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(r, 14), draw(11, r), 0.5 + number) for number, r in enumerate((3, 5, 2))]


def merged(given, weights) -> torch.Tensor:
    deltas = Deltas.of(given, weights, target="lin", dtype=torch.float64)
    return make_method("norm_match", {}).merge(deltas, Context()).dense()


@pytest.mark.parametrize(("weights", "used"), [((1.0, 1.0, 1.0), 3), ((0.5, -2.0, 1.0), 3), ((0.5, 1.0, 0.0), 2)])
def test_it_is_the_dense_formula(weights, used) -> None:
    dense = [update.delta() for update in updates()]
    total = sum(weight * delta for weight, delta in zip(weights, dense, strict=True))
    target = sum(float(delta.norm()) for delta in dense[:used]) / used
    found = merged(updates(), weights)
    assert float(found.norm()) == pytest.approx(target, rel=1e-12)
    assert_close(found, target / total.norm() * total, atol=1e-10, rtol=1e-10)


def test_sums_of_zero_stay_zero() -> None:
    first = updates()[0]
    rescaled = LowRank(first.a / 3, first.b, 3 * first.scaling)
    nothing = LowRank(first.a, 0 * first.b, 1.0)
    assert not merged([first, rescaled], (1.0, -1.0)).any()
    assert not merged([nothing, nothing], (1.0, 1.0)).any()
    assert not merged([first, first], (0.0, 0.0)).any()
    assert_close(merged([first, nothing], (1.0, 1.0)), 0.5 * first.delta())
