"""Iso-C against a dense SVD."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method

RANKS, WEIGHTS = (3, 5, 2), (1.0, -0.5, 2.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas(ranks=RANKS, out=13, width=17, weights=WEIGHTS) -> Deltas:
    given = [LowRank(draw(r, width, seed=n), draw(out, r, seed=9 + n), 0.5 + n) for n, r in enumerate(ranks)]
    return Deltas.of(given, weights, names="abcdefgh"[: len(ranks)], target="lin", dtype=torch.float64)


def weighted(given: Deltas) -> torch.Tensor:
    """Return every ``w_n delta_n``, dense: ``(N, O, I)``."""
    return given.weights[:, None, None] * given.rows(0, given.shape[0])


def test_it_is_the_flat_spectrum_on_the_support() -> None:
    given = deltas()
    u, s, v = torch.linalg.svd(weighted(given).sum(0), full_matrices=False)
    merged = make_method("iso", {"scale": 1.3}).merge(given, Context())
    assert merged.a.shape[0] == 10
    assert_close(merged.dense(), 1.3 * s[:10].mean() * u[:, :10] @ v[:10], atol=1e-10, rtol=1e-10)


def test_it_is_the_paper_where_the_sum_has_full_rank() -> None:
    given = deltas(out=8)
    u, s, v = torch.linalg.svd(weighted(given).sum(0), full_matrices=False)
    assert_close(make_method("iso", {}).merge(given, Context()).dense(), s.mean() * u @ v, atol=1e-10, rtol=1e-10)


def test_a_tiny_change_of_the_input_changes_little() -> None:
    """The dense formula moves by 1.33 of its norm under 1e-12 here (spec)."""
    given = deltas()
    moved = Deltas(given.a, tuple(b + 1e-12 * draw(*b.shape) for b in given.b), given.weights, given.names, "lin")
    before, after = (make_method("iso", {}).merge(one, Context()).dense() for one in (given, moved))
    assert float((after - before).norm() / before.norm()) < 1e-10


@pytest.mark.parametrize(("threshold", "rank"), [(1e-5, 4), (0.4, 2)])
def test_the_threshold_decides_the_support(threshold, rank) -> None:
    b, a = torch.linalg.qr(draw(13, 4)).Q * torch.tensor([1.0, 0.5, 0.3, 1e-3]), torch.linalg.qr(draw(17, 4)).Q.T
    one = Deltas.of([LowRank(a, b, 1.0)], [1.0], dtype=torch.float64)
    assert make_method("iso", {"threshold": threshold}).merge(one, Context()).a.shape[0] == rank
