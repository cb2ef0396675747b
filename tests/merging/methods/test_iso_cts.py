"""Iso-CTS against the published algorithm on dense deltas."""

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


def published(updates: torch.Tensor, total: int, common: float) -> torch.Tensor:
    """The official steps with ``total`` directions in place of ``min(O, I)``."""
    count = len(updates)
    own = round((total - int(total * common)) / count)
    shared = total - own * count
    u, s, v = torch.linalg.svd(updates.sum(0), full_matrices=False)
    lefts, values, rights = [], [], []
    for one in updates:
        rest = torch.linalg.svd(one - u[:, :shared] @ u[:, :shared].T @ one, full_matrices=False)
        lefts.append(rest[0][:, :own])
        values.append(rest[1][:own])
        rights.append(rest[2][:own])
    left, right = torch.cat([*lefts, u[:, :shared]], 1), torch.cat([*rights, v[:shared]])
    left, right = (torch.linalg.svd(side, full_matrices=False) for side in (left, right))
    return torch.cat([*values, s[:shared]]).mean() * (left[0] @ left[2]) @ (right[0] @ right[2])


@pytest.mark.parametrize("common", [0.5, 0.8, 1.0])
def test_it_is_the_published_algorithm(common) -> None:
    given = deltas()
    merged = make_method("iso_cts", {"common": common, "scale": 1.5}).merge(given, Context()).dense()
    assert_close(merged, 1.5 * published(weighted(given), 10, common), atol=1e-10, rtol=1e-10)


def test_all_common_is_iso() -> None:
    given = deltas()
    merged = make_method("iso_cts", {"common": 1.0}).merge(given, Context()).dense()
    assert_close(merged, make_method("iso", {}).merge(given, Context()).dense(), atol=1e-10, rtol=1e-10)


def test_more_adapters_than_directions() -> None:
    """Five directions, eight adapters, nothing common: rounding gives one direction each, three too many."""
    given = deltas(ranks=(1,) * 8, out=5, weights=(1.0,) * 8)
    merged = make_method("iso_cts", {"common": 0.0}).merge(given, Context()).dense()
    assert_close(merged, make_method("iso", {}).merge(given, Context()).dense(), atol=1e-10, rtol=1e-10)


def test_an_adapter_inside_the_common_space_adds_no_direction() -> None:
    """Its remainder is rounding, whose singular vectors are arbitrary."""
    b, a = torch.linalg.qr(draw(13, 4)).Q, torch.linalg.qr(draw(17, 4)).Q.T
    s = torch.tensor([8.0, 4.0, 2.0, 1.0]).double()
    loud, quiet = LowRank(a[:2], b[:, :2] * s[:2], 1.0), LowRank(a[2:], b[:, 2:] * s[2:], 1.0)
    given = Deltas.of([loud, quiet], (1.0, 1.0), dtype=torch.float64)
    merged = make_method("iso_cts", {"common": 0.5}).merge(given, Context())
    assert merged.a.shape[0] == 3
    assert_close(merged.dense(), 14 / 3 * b[:, :3] @ a[:3], atol=1e-10, rtol=1e-10)
