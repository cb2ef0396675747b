"""Statistics from factors against dense float64 deltas; independence of the split into factors."""

import math
from dataclasses import replace

import pytest
import torch

from compose.adapter import LowRank
from compose.hub_index.audit.statistics import (
    ModuleStatistics,
    _factor_moments,
    _row_moments,
    factor_statistics,
    kurtosis,
    module_statistics,
)
from compose.merging.deltas import Factors


def factors(out: int, wide: int, rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, wide, generator=generator, dtype=torch.float64) + 0.3
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, rank).double()
    return Factors(a, b)


def dense_kurtosis(delta: torch.Tensor) -> float:
    centred = delta.double() - delta.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


@pytest.mark.parametrize(("out", "wide", "rank"), [(7, 5, 1), (30, 40, 3), (64, 48, 8), (33, 21, 20), (9, 6, 12)])
def test_kurtosis_is_that_of_the_dense_delta(out: int, wide: int, rank: int) -> None:
    one = factors(out, wide, rank)
    expected = dense_kurtosis(one.dense())
    assert kurtosis(one) == pytest.approx(expected, rel=1e-10)
    for moments in (_factor_moments, _row_moments):
        dense = one.dense()
        assert moments(one) == pytest.approx([float(dense.pow(k).mean()) for k in (1, 2, 3, 4)], rel=1e-10)


def test_rows_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    one = factors(50, 30, 20)
    whole = _row_moments(one)
    monkeypatch.setattr("compose.hub_index.audit.statistics._ROW_ENTRIES", 70)
    assert _row_moments(one) == pytest.approx(whole, rel=1e-12)


def test_a_delta_of_equal_entries_has_no_kurtosis() -> None:
    assert kurtosis(Factors(torch.ones(1, 4).double(), torch.ones(3, 1).double())) == 0.0


@pytest.mark.parametrize("rank", [1, 4, 15])
def test_the_spectrum_is_that_of_the_dense_delta(rank: int) -> None:
    a, b = torch.randn(rank, 12), torch.randn(10, rank)
    found = module_statistics("m", LowRank(a, b, -0.7))
    values = torch.linalg.svdvals(-0.7 * b.double() @ a.double())
    shares = values.square() / values.square().sum()
    assert found.leading == pytest.approx(values[: min(rank, 8)].tolist(), rel=1e-9)
    assert found.fro == pytest.approx(float(values.norm()), rel=1e-12)
    assert found.energy1 == pytest.approx(float(shares[0]), rel=1e-9)
    assert found.spec_entropy == pytest.approx(float(-torch.special.xlogy(shares, shares).sum()), abs=1e-9)
    assert found.kurtosis == pytest.approx(dense_kurtosis(-0.7 * b.double() @ a.double()), rel=1e-9)
    assert (found.rank, found.sigma1) == (rank, found.leading[0])


def test_the_split_into_factors_does_not_matter() -> None:
    a, b = torch.randn(4, 20).double(), torch.randn(16, 4).double()
    mixing = torch.randn(4, 4).double() * torch.tensor([1e4, 1.0, 1.0, 1e-4]).double()
    one = module_statistics("m", LowRank(a, b, 0.5))
    other = module_statistics("m", LowRank(torch.linalg.solve(mixing, a), b @ mixing, 0.5))
    for name in ("sigma1", "fro", "energy1", "spec_entropy", "kurtosis"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6), name


def test_equal_singular_values_have_the_largest_entropy() -> None:
    found = module_statistics("m", LowRank(torch.eye(5, 9), torch.eye(7, 5), 3.0))
    assert found.spec_entropy == pytest.approx(math.log(5), rel=1e-12)
    assert (found.sigma1, found.energy1) == (pytest.approx(3.0), pytest.approx(0.2))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_alone_changes_no_shape(size: float) -> None:
    one = factors(12, 9, 3)
    plain, scaled = factor_statistics("m", one), factor_statistics("m", one, size)
    assert scaled.fro == pytest.approx(plain.fro * size, rel=1e-12)
    assert scaled.kurtosis == pytest.approx(plain.kurtosis, rel=1e-9)
    assert scaled.spec_entropy == pytest.approx(plain.spec_entropy, rel=1e-9)


def test_zeros_and_values_that_are_not_finite() -> None:
    zero = module_statistics("m", LowRank(torch.randn(2, 5), torch.zeros(4, 2), 1.0))
    assert (zero.b_zero, zero.fro, zero.sigma1, zero.kurtosis) == (True, 0.0, 0.0, 0.0)
    bad = torch.randn(4, 2)
    bad[0] = math.nan
    found = module_statistics("m", LowRank(torch.randn(2, 5), bad, 1.0))
    assert (found.num_nonfinite, found.fro) == (2, 0.0)
    assert module_statistics("m", LowRank(torch.ones(1, 2), torch.ones(2, 1), math.inf)).num_nonfinite == 1
    huge = LowRank(torch.full((1, 2), 1e200, dtype=torch.float64), torch.full((2, 1), 1e200, dtype=torch.float64), 1.0)
    assert module_statistics("m", huge).num_nonfinite == 1
    assert (zero.to_record().fro, zero.to_record().kurtosis) == (0.0, None)
    assert (found.to_record().fro, found.to_record().num_nonfinite) == (None, 2)


def test_what_an_index_stores_comes_back() -> None:
    found = module_statistics("m", LowRank(torch.randn(3, 12), torch.randn(10, 3), 0.5))
    again = ModuleStatistics.of_record(found.to_record(), 3)
    assert replace(found, leading=found.leading[:1]) == again
