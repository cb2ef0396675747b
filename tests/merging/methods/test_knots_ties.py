"""KnOTS-TIES against a dense SVD and a textbook TIES."""

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
def test_it_is_ties_on_the_coordinates(density) -> None:
    given = deltas()
    u, s, v = torch.linalg.svd(torch.cat(list(weighted(given)), dim=1), full_matrices=False)
    coordinates = torch.stack((s[:10, None] * v[:10]).split(17, dim=1))
    merged = make_method("knots_ties", {"density": density, "scale": 0.6}).merge(given, Context())
    assert merged.a.shape[0] == 10
    assert_close(merged.dense(), 0.6 * u[:, :10] @ textbook_ties(coordinates, density), atol=1e-10, rtol=1e-10)


def test_without_pruning_and_election_it_is_the_sum() -> None:
    """The linear merge of KnOTS is an identity with task arithmetic."""
    given = deltas()
    merged = make_method("knots_ties", {"density": 1.0, "elect": "none", "denominator": "none"}).merge(
        given, Context()
    )
    assert_close(merged.dense(), weighted(given).sum(0), atol=1e-10, rtol=1e-10)


def test_small_singular_values_are_dropped_relative_to_the_largest() -> None:
    given = deltas()
    s = torch.linalg.svdvals(torch.cat(list(weighted(given)), dim=1))
    options = {"density": 1.0, "threshold": float((s[5] + s[6]) / 2 / s[0])}
    for factor in (1.0, 1e-7):
        small = deltas(weights=[factor * weight for weight in WEIGHTS])
        assert make_method("knots_ties", options).merge(small, Context()).a.shape[0] == 6
