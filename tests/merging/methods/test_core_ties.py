"""Core-space TIES against dense singular vectors and a textbook TIES."""

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


def textbook_ties(stack: torch.Tensor, density: float) -> torch.Tensor:
    """Top entries of each by a full sort, sign of the sum, mean of those that agree."""
    kept = torch.zeros_like(stack)
    for one, out in zip(stack, kept, strict=True):
        top = one.abs().flatten().argsort(descending=True)[: int(density * one.numel())]
        out.view(-1)[top] = one.flatten()[top]
    sign = kept.sum(0).sign()
    agree = (kept.sign() == sign) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("density", [0.2, 0.75, 1.0])
def test_it_is_ties_between_the_singular_vectors_of_all_updates(density) -> None:
    given = deltas()
    updates = weighted(given)
    u = torch.linalg.svd(torch.cat(list(updates), dim=1), full_matrices=False)[0][:, :10]
    v = torch.linalg.svd(torch.cat(list(updates), dim=0), full_matrices=False)[2][:10].T
    merged = make_method("core_ties", {"density": density, "scale": 0.6}).merge(given, Context())
    assert merged.a.shape[0] == 10
    assert_close(merged.dense(), 0.6 * u @ textbook_ties(u.T @ updates @ v, density) @ v.T, atol=1e-10, rtol=1e-10)


def test_unused_directions_do_not_count_as_entries() -> None:
    """The same adapter twice: ten factor rows, five directions; the density is of 25 entries, not of 100."""
    update = LowRank(draw(5, 17), draw(13, 5), 1.0)
    twice = Deltas.of([update, update], (1.0, 1.0), dtype=torch.float64)
    once = Deltas.of([update], (1.0,), dtype=torch.float64)
    found = make_method("core_ties", {"density": 0.4}).merge(twice, Context())
    expected = make_method("core_ties", {"density": 0.4}).merge(once, Context())
    assert_close(found.dense(), expected.dense(), atol=1e-10, rtol=1e-10)
    assert found.a.shape[0] == 5


def test_opposite_updates_cancel_whatever_the_basis_signs() -> None:
    update = LowRank(draw(5, 17), draw(13, 5), 1.0)
    both = Deltas.of([update, update], (1.0, -1.0), dtype=torch.float64)
    assert float(make_method("core_ties", {}).merge(both, Context()).dense().abs().max()) < 1e-12
