"""OPCM against the published steps on dense deltas."""

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


def published(updates: torch.Tensor, alpha: float, ranks=RANKS) -> torch.Tensor:
    """The official loop; the diagonal ends with the rank merged so far."""
    merged, factor = updates[0], 1.0
    norms = [float(one.norm()) for one in updates]
    for t in range(1, len(updates)):
        u, s, v_t = torch.linalg.svd(merged, full_matrices=True)
        block = int((s.cumsum(0) / s.sum() > alpha).int().argmax())
        projected = u.T @ updates[t] @ v_t.T
        for place in range(sum(ranks[:t])):
            projected[place, place] = 0
        projected[:block, :block] = 0
        grown = factor * merged + u @ projected @ v_t
        mean = sum(norms[: t + 1]) / (t + 1)
        factor = float(grown.norm()) / mean
        merged = grown / factor
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_it_is_the_published_loop(alpha) -> None:
    given = deltas()
    merged = make_method("opcm", {"alpha": alpha}).merge(given, Context())
    assert merged.a.shape[0] <= 10
    assert_close(merged.dense(), published(weighted(given), alpha), atol=1e-10, rtol=1e-10)


def test_the_norm_is_the_mean_norm() -> None:
    given = deltas()
    mean = weighted(given).flatten(1).norm(dim=1).mean()
    assert_close(make_method("opcm", {}).merge(given, Context()).dense().norm(), mean, atol=1e-10, rtol=1e-10)


def test_the_same_adapter_twice_keeps_its_direction() -> None:
    """What lies on the diagonal of the merge so far adds nothing."""
    given = deltas(ranks=(3,), weights=(1.0,))
    twice = Deltas(given.a * 2, given.b * 2, torch.tensor([1.0, 2.0]).double(), ("a", "b"), "lin")
    found = make_method("opcm", {}).merge(twice, Context()).dense()
    assert_close(found, 1.5 * weighted(given)[0], atol=1e-10, rtol=1e-10)
