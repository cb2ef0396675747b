"""DRM against the published steps on dense deltas."""

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


def published(updates: torch.Tensor, density: float, threshold: float) -> torch.Tensor:
    """Horizontal stacking; the number of entries kept is exact."""
    u, s, v = torch.linalg.svd(torch.cat(list(updates), dim=1), full_matrices=False)
    rank = int((s > threshold * s[0]).sum())
    parts = torch.stack(v[:rank].split(updates.shape[2], dim=1))
    lengths = parts.norm(dim=2, keepdim=True)
    unit = parts / lengths
    top = unit.abs().flatten().argsort(descending=True)[: int(density * unit.numel())]
    kept = torch.zeros(unit.numel()).double()
    kept[top] = unit.flatten()[top]
    rows = kept.view_as(unit) * lengths * s[:rank, None]
    agree = (rows.sign() == rows.sum(0).sign()) & (rows != 0)
    return u[:, :rank] @ ((rows * agree).sum(0) / agree.sum(0).clamp(min=1))


@pytest.mark.parametrize("threshold", [1e-2, 0.3])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_it_is_the_published_algorithm(density, threshold) -> None:
    given = deltas()
    options = {"density": density, "threshold": threshold, "scale": 0.5}
    merged = make_method("drm", options).merge(given, Context()).dense()
    assert_close(merged, 0.5 * published(weighted(given), density, threshold), atol=1e-10, rtol=1e-10)
    merged = make_method("drm", options | {"stack": "vertical"}).merge(given, Context()).dense()
    assert_close(merged, 0.5 * published(weighted(given).mT, density, threshold).T, atol=1e-10, rtol=1e-10)


def test_rows_an_adapter_has_no_part_in_are_not_blown_up() -> None:
    """Left spaces that are orthogonal: every direction belongs to one adapter, the others' rows are rounding."""
    b = torch.linalg.qr(draw(13, 5)).Q
    given = [LowRank(draw(3, 17), b[:, :3], 1.0), LowRank(draw(2, 17, seed=1), b[:, 3:], 1.0)]
    found = Deltas.of(given, (1.0, 1.0), dtype=torch.float64)
    merged = make_method("drm", {"density": 0.5}).merge(found, Context())
    kept = torch.linalg.lstsq(merged.b, merged.dense()).solution
    assert int((kept.abs() > 1e-9).sum()) == 85  # int(0.5 * 2 * 5 * 17), none spent on rounding
