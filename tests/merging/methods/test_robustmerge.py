"""robustmerge against its published steps written densely, and what its gauge makes of it."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors
from compose.merging.method import Context, make_method


def updates(ranks=(5, 5, 5)) -> list[LowRank]:
    generator = torch.Generator().manual_seed(16)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(r, 14), draw(11, r), 0.5 + number) for number, r in enumerate(ranks)]


def merged(given, weights=None, **options) -> Factors:
    deltas = Deltas.of(given, weights or [1.0] * len(given), target="lin", dtype=torch.float64)
    return make_method("robustmerge", options).merge(deltas, Context())


def keep_largest(factor, count) -> torch.Tensor:
    found = torch.zeros(factor.shape, dtype=factor.dtype)
    for place in factor.abs().flatten().argsort(descending=True)[:count].tolist():
        found.view(-1)[place] = factor.flatten()[place]
    return found


def published(factors, density, att_ratio, scale) -> torch.Tensor:
    """Of equal ranks: prune, compensate, floor at the quantile, sum A and average B by S."""
    total_a, total_b, total_s = 0.0, 0.0, 0.0
    for a, b in factors:
        pruned_a, pruned_b = (keep_largest(x, int(density * x.numel())) for x in (a, b))
        strength = a.abs().sum(dim=1) / pruned_a.abs().sum(dim=1)
        floor = sorted(strength.tolist())[int(len(a) * (1 - att_ratio))]
        strength = strength.clamp(min=floor)
        total_a, total_b, total_s = total_a + pruned_a, total_b + pruned_b * strength, total_s + strength
    return scale * (total_b / total_s) @ total_a


@pytest.mark.parametrize(("density", "att_ratio"), [(0.2, 0.2), (0.5, 0.4), (0.9, 1.0)])
def test_in_the_given_gauge_it_is_the_published_method(density, att_ratio) -> None:
    factors = [(u.a, u.scaling * u.b) for u in updates()]
    expected = published(factors, density, att_ratio, 4.0)
    found = merged(updates(), density=density, att_ratio=att_ratio, gauge="given")
    assert found.a.shape == (5, 14)
    assert_close(found.dense(), expected, atol=1e-10, rtol=1e-10)


def svd_factors(update) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, v_t = torch.linalg.svd(update.delta(), full_matrices=False)
    root = s[: update.rank].sqrt()
    a, b = root[:, None] * v_t[: update.rank], u[:, : update.rank] * root
    for row in range(update.rank):
        if a[row, a[row].abs().argmax()] < 0:
            a[row], b[:, row] = -a[row], -b[:, row]
    return a, b


def test_in_the_balanced_gauge_it_is_the_published_method_on_singular_vectors() -> None:
    expected = published([svd_factors(u) for u in updates()], 0.8, 0.4, 1.0)
    assert_close(merged(updates(), density=0.8, att_ratio=0.4, scale=1.0).dense(), expected, atol=1e-10, rtol=1e-10)


def test_the_balanced_gauge_makes_the_split_into_factors_irrelevant() -> None:
    generator = torch.Generator().manual_seed(17)
    turned = []
    for update in updates():
        gauge = torch.randn(5, 5, dtype=torch.float64, generator=generator)
        turned.append(LowRank(torch.linalg.inv(gauge) @ update.a, update.b @ gauge, update.scaling))
    found, again = merged(updates()).dense(), merged(turned).dense()
    assert_close(again, found, atol=1e-9, rtol=1e-9)
    given, moved = (merged(x, gauge="given").dense() for x in (updates(), turned))
    assert (moved - given).norm() > 0.5 * given.norm()


def test_smaller_ranks_are_zero_rows_that_do_not_enter_the_average() -> None:
    """Rows beyond the smaller rank come from the larger adapter alone: its own product, not half of it."""
    small, large = updates((2, 4))
    found = merged([small, large], density=1.0, scale=1.0, gauge="given")
    assert found.a.shape == (4, 14)
    assert_close(found.b[:, 2:] @ found.a[2:], large.scaling * large.b[:, 2:] @ large.a[2:], atol=1e-10, rtol=1e-10)
    shared_b = (small.scaling * small.b + large.scaling * large.b[:, :2]) / 2
    assert_close(found.b[:, :2] @ found.a[:2], shared_b @ (small.a + large.a[:2]), atol=1e-10, rtol=1e-10)


def test_weights_scale_the_updates_and_zero_leaves_one_out() -> None:
    first, second, third = updates()
    scaled = [LowRank(first.a, first.b, 3 * first.scaling), LowRank(third.a, -third.b, 0.5 * third.scaling)]
    found = merged([first, second, third], [3.0, 0.0, -0.5]).dense()
    # The sign is on B in both, so only the gauge (canonical from A) has to agree, and it does.
    assert_close(found, merged(scaled).dense(), atol=1e-9, rtol=1e-9)


def test_a_row_emptied_by_pruning_takes_the_largest_strength_and_nothing_is_nan() -> None:
    a = torch.ones(3, 4, dtype=torch.float64) * torch.tensor([[100.0], [1.0], [50.0]], dtype=torch.float64)
    a[0, 0] = 101.0  # 5 of 12 entries survive: row 0 and one of row 2
    a[2, 1] = 51.0
    b = torch.eye(3, dtype=torch.float64) + 0.1
    found = merged([LowRank(a, b, 1.0)], density=5 / 12, att_ratio=1.0, scale=1.0, gauge="given")
    assert found.dense().isfinite().all()
    assert not found.a[1].any()
    # One adapter: S cancels in the average, whatever it is.
    assert_close(found.b, keep_largest(b, 3))
    # Two: the other's row 1 has S = 1; the emptied row counts like row 2 (201 / 51), the largest S of its adapter.
    other = torch.ones(3, 4, dtype=torch.float64) * torch.tensor([[0.1], [9.0], [0.2]], dtype=torch.float64)
    found = merged(
        [LowRank(a, b, 1.0), LowRank(other, 2 * b, 1.0)], density=5 / 12, att_ratio=1.0, scale=1.0, gauge="given"
    )
    strongest = (3 * 50.0 + 51.0) / 51.0
    assert_close(found.a[1], torch.full((4,), 9.0, dtype=torch.float64))
    assert_close(found.b[:, 1], (strongest * keep_largest(b, 3) + 2 * keep_largest(b, 3))[:, 1] / (strongest + 1))


def test_zero_deltas_are_defined() -> None:
    first = updates()[0]
    nothing = LowRank(first.a, 0 * first.b, 1.0)
    assert merged([nothing]).dense().shape == (11, 14)
    assert not merged([nothing]).dense().any()
    assert_close(merged([first, nothing]).dense(), merged([first]).dense())
    assert not merged([first, first], [0.0, 0.0]).dense().any()
    assert merged([nothing, first], gauge="given").dense().isfinite().all()


@pytest.mark.parametrize(
    "options", [{"density": 0.0}, {"density": 1.1}, {"att_ratio": 0.0}, {"scale": 0.0}, {"gauge": "svd"}]
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(IncompatibleError, match=f"{next(iter(options))}.* must be"):
        make_method("robustmerge", options)
