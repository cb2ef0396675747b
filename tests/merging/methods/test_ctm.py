"""CtM against HOOI on the dense deltas and a textbook TIES."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method
from compose.merging.methods.ctm import hooi

RANKS, WEIGHTS = (3, 5, 2), (1.0, -0.5, 2.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas(ranks=RANKS, out=13, width=17, weights=WEIGHTS) -> Deltas:
    given = [LowRank(draw(r, width, seed=n), draw(out, r, seed=9 + n), 0.5 + n) for n, r in enumerate(ranks)]
    return Deltas.of(given, weights, names="abcdefgh"[: len(ranks)], target="lin", dtype=torch.float64)


def weighted(given: Deltas) -> torch.Tensor:
    """Return every ``w_n delta_n``, dense: ``(N, O, I)``."""
    return given.weights[:, None, None] * given.rows(0, given.shape[0])


def textbook_ties(stack: torch.Tensor, density: float) -> torch.Tensor:
    """Top entries of each by a full sort, sign of the sum, mean of those that agree."""
    kept = torch.zeros_like(stack)
    for one, out in zip(stack, kept, strict=True):
        top = one.abs().flatten().argsort(descending=True)[: int(density * one.numel())]
        out.view(-1)[top] = one.flatten()[top]
    sign = kept.sum(0).sign()
    agree = (kept.sign() == sign) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp(min=1)


def dense_hooi(updates: torch.Tensor, rank: int, sweeps: int) -> tuple[torch.Tensor, torch.Tensor]:
    v = torch.linalg.svd(torch.cat(list(updates), dim=0), full_matrices=False)[2][:rank].T
    for _ in range(sweeps):
        u = torch.linalg.svd(torch.cat(list(updates @ v), dim=1), full_matrices=False)[0][:, :rank]
        v = torch.linalg.svd(torch.cat(list(u.T @ updates), dim=0), full_matrices=False)[2][:rank].T
    return u, v


@pytest.mark.parametrize(("rank", "q"), [(None, 5), (3, 3), (7, 7)])
def test_it_is_ties_on_the_tucker_cores(rank, q) -> None:
    given = deltas()
    updates = weighted(given)
    norms = updates.flatten(1).norm(dim=1)
    blended = updates * ((0.25 * norms + 0.75 * norms.mean()) / norms)[:, None, None]
    u, v = dense_hooi(blended, q, 4)
    merged = make_method("ctm", {"rank": rank, "sweeps": 4, "tolerance": 0.0}).merge(given, Context())
    assert merged.a.shape[0] == q
    expected = 0.75 * u @ textbook_ties(u.T @ blended @ v, 0.25) @ v.T
    assert_close(merged.dense(), expected, atol=1e-9, rtol=1e-9)


def test_hooi_stops_where_it_gains_nothing() -> None:
    stack = weighted(deltas())
    held = [(u.T @ stack @ v).square().sum() for u, v in (hooi(stack, 3, sweeps, 0.0) for sweeps in (1, 2, 5, 200))]
    assert held == sorted(held)
    u, v = hooi(stack, 3, 10_000, 1e-12)
    assert held[-1] > held[0]
    energies = (u.T @ stack @ v).square().sum(dim=(0, 1))
    assert bool((energies.diff() <= 0).all())
    again = (stack @ v).transpose(0, 1).flatten(1)
    best = torch.linalg.svd(again, full_matrices=False)[0][:, :3]
    assert_close(u @ u.T, best @ best.T, atol=1e-4, rtol=1e-4)
    early, late = (hooi(stack, 3, 30, tolerance) for tolerance in (1e-2, 0.0))
    assert float((early[0] @ early[0].T - late[0] @ late[0].T).norm()) > 1e-6


def test_the_blend_evens_out_norms() -> None:
    """With beta 0 every update has the mean norm, so only directions and mean matter."""
    options = {"beta": 0.0, "density": 1.0, "elect": "none", "denominator": "none", "scale": 1.0, "rank": 10}
    given = deltas()
    updates = weighted(given)
    norms = updates.flatten(1).norm(dim=1)
    merged = make_method("ctm", options).merge(given, Context()).dense()
    assert_close(merged, (updates / norms[:, None, None]).sum(0) * norms.mean(), atol=1e-9, rtol=1e-9)
