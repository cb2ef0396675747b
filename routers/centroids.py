"""Centroids of a few thousand vectors: k-means without random numbers.

Shape letters: ``N`` vectors, ``D`` their width, ``P`` centroids.
"""

from __future__ import annotations

import torch

from compose.errors import IncompatibleError

_MAX_ROUNDS = 300


def centroids(x_ND: torch.Tensor, count: int, *, what: str = "the data") -> torch.Tensor:
    """Return ``(P, D)`` float64: Lloyd's algorithm from the farthest points, the same for every order of the vectors.

    It starts at the vector nearest to the mean and adds, one by one, the vector farthest from all that are taken. With
    fewer than ``P`` different vectors the last centroid is repeated, which changes no nearest distance.

    Args:
        x_ND: Any float dtype; kept in memory whole.
        count: ``P``.
        what: Named in messages.

    Raises:
        IncompatibleError: No vectors, or numbers that are not finite.
    """
    x = x_ND.detach().to("cpu", torch.float64)
    if not len(x) or not bool(x.isfinite().all()) or count < 1:
        raise IncompatibleError(f"{what}: centroids need at least one vector of finite numbers, and count >= 1")
    x, weights = torch.unique(x, dim=0, return_counts=True)  # sorted, so that sums have one order
    means = x[_farthest(x, weights, count)]
    nearest = torch.full((len(x),), -1)
    for _ in range(_MAX_ROUNDS):
        closest = _distances(x, means).argmin(1)
        if torch.equal(closest, nearest):
            break
        nearest = closest
        sums = torch.zeros_like(means).index_add(0, nearest, x * weights[:, None])
        sizes = torch.zeros(len(means), dtype=weights.dtype).index_add(0, nearest, weights)
        means = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], means)
    return torch.cat([means, means[-1:].expand(count - len(means), -1)])


def _farthest(x: torch.Tensor, weights: torch.Tensor, count: int) -> list[int]:
    """Numbers of the starting vectors: at most ``count``, all different."""
    mean = (x * weights[:, None]).sum(0) / weights.sum()
    taken = [int(_distances(x, mean[None]).argmin())]
    away = _distances(x, x[taken]).squeeze(1)
    while len(taken) < count and away.max() > 0:
        taken.append(int(away.argmax()))
        away = torch.minimum(away, _distances(x, x[taken[-1:]]).squeeze(1))
    return taken


def _distances(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """``(N, P)``, exact for equal vectors."""
    return torch.cdist(x, means, compute_mode="donot_use_mm_for_euclid_dist")
