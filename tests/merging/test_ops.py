"""Sums and recompression against dense arithmetic."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.ops import concatenate, recompress, sum_factors


def update(rank: int, scaling: float) -> LowRank:
    return LowRank(torch.randn(rank, 11), torch.randn(7, rank), scaling)


def test_concatenate_is_the_exact_sum() -> None:
    updates, weights = [update(2, 0.5), update(5, 2.0), update(1, -1.0)], [0.7, 0.0, -0.3]
    found = concatenate(updates, weights)
    assert found.rank == 3
    assert_close(found.delta(), sum(w * u.delta() for u, w in zip(updates, weights, strict=True)))
    with pytest.raises(IncompatibleError, match="every weight is 0"):
        concatenate(updates, [0.0, 0.0, 0.0])


def test_sum_factors_is_lorahubs_formula_for_equal_scalings() -> None:
    updates, weights = [update(3, 2.0), update(3, 2.0)], [0.7, -0.3]
    a = sum(w * u.a for u, w in zip(updates, weights, strict=True))
    b = sum(w * u.b for u, w in zip(updates, weights, strict=True))
    assert_close(sum_factors(updates, weights).delta(), 2.0 * b @ a)


@pytest.mark.parametrize(("scaling", "weight"), [(2.0, 1.0), (-2.0, 1.0), (2.0, -1.0)])
def test_sum_factors_of_one_is_its_delta_times_the_squared_weight(scaling: float, weight: float) -> None:
    one = update(3, scaling)
    assert_close(sum_factors([one], [weight]).delta(), weight**2 * one.delta())


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_recompress_is_the_truncated_svd(rank: int) -> None:
    one = update(5, 1.7)
    u, s, v = torch.linalg.svd(one.delta(), full_matrices=False)
    found = recompress(one, rank)
    assert found.update.rank == rank
    assert_close(found.update.delta(), u[:, :rank] * s[:rank] @ v[:rank], atol=1e-4, rtol=1e-4)
    assert found.relative_error == pytest.approx(float((s[rank:].square().sum() / s.square().sum()).sqrt()), rel=1e-4)


def test_recompress_at_full_rank_loses_nothing() -> None:
    one = update(5, 1.7)
    found = recompress(one, 64)
    assert found.relative_error < 1e-12
    assert_close(found.update.delta(), one.delta(), atol=1e-4, rtol=1e-4)


def test_the_norm_is_the_frobenius_norm_of_the_delta() -> None:
    one = update(5, -1.7)
    assert one.norm() == pytest.approx(float(one.delta().norm()), rel=1e-5)
