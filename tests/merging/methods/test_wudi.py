"""WUDI: the closed form against a dense pseudo-inverse, and against the loss it minimises."""

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


def loss(merged: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    apart = (merged - updates) @ updates.mT
    return (apart.flatten(1).square().sum(1) / updates.flatten(1).square().sum(1)).sum()


@pytest.mark.parametrize("width", [17, 7])
def test_it_is_the_dense_closed_form(width) -> None:
    """Seven inputs and ten factor rows: the adapters cannot all be satisfied."""
    given = deltas(width=width)
    updates = weighted(given)
    h = updates.mT @ updates / updates.flatten(1).square().sum(1)[:, None, None]
    expected = (updates @ h).sum(0) @ torch.linalg.pinv(h.sum(0), rtol=1e-11, hermitian=True)
    merged = make_method("wudi", {"scale": 0.5}).merge(given, Context())
    assert merged.a.shape[0] <= 10
    assert_close(merged.dense(), 0.5 * expected, atol=1e-9, rtol=1e-9)


def test_nothing_has_a_lower_loss() -> None:
    given = deltas(width=7)
    updates = weighted(given)
    merged = make_method("wudi", {}).merge(given, Context()).dense().requires_grad_()
    reached = loss(merged, updates)
    (gradient,) = torch.autograd.grad(reached, merged)
    assert float(gradient.abs().max()) < 1e-9 * float(loss(updates.sum(0), updates))
    assert float(reached.detach()) < 0.5 * float(loss(updates.sum(0), updates))


def test_independent_row_spaces_are_all_satisfied() -> None:
    given = deltas()
    assert float(loss(make_method("wudi", {}).merge(given, Context()).dense(), weighted(given))) < 1e-18


def test_it_is_linear_in_the_weights() -> None:
    first, second = deltas(weights=(1.0, 2.0, 3.0)), deltas(weights=(0.5, -4.0, 1.0))
    both = deltas(weights=(1.5, -2.0, 4.0))
    parts = [make_method("wudi", {}).merge(one, Context()).dense() for one in (first, second)]
    assert_close(make_method("wudi", {}).merge(both, Context()).dense(), sum(parts), atol=1e-9, rtol=1e-9)
