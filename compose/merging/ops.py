"""Pure operations on the updates of one target: exact sums, factor sums, and optimal recompression.

Letters: ``N`` updates, ``R`` rank rows, ``I`` input and ``O`` output width. Arithmetic runs in float64 where a result
is decomposed and in float32 otherwise; results have the dtype of the first update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Factors, compact


def concatenate(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return ``sum_n weights[n] * delta_n`` exactly, at rank ``sum R_n``: factors side by side, weights in ``b``.

    The result's scaling is 1. Updates of weight 0 are left out; at least one must remain.
    """
    used = [(update, weight) for update, weight in zip(updates, weights, strict=True) if weight != 0]
    if not used:
        raise IncompatibleError("every weight is 0, so nothing is left to concatenate; leave this target out")
    first = used[0][0]
    a = torch.cat([update.a.float() for update, _ in used])
    b = torch.cat([update.b.float() * (weight * update.scaling) for update, weight in used], dim=1)
    return LowRank(a.to(first.a.dtype), b.to(first.b.dtype), 1.0, first.kind)


def sum_factors(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Return LoRAHub's composition (arXiv:2307.13269): the product of the weighted sums of the factors.

    ``(sum_n w_n sign(s_n) sqrt|s_n| B_n)(sum_n w_n sqrt|s_n| A_n)``, smaller ranks padded with zero rows. With equal
    scalings ``s`` this is ``s (sum w B)(sum w A)``. It has cross terms ``B_i A_j`` and is not a mixture of updates.
    """
    rank = max(update.rank for update in updates)
    first = updates[0]
    a = torch.zeros(rank, first.in_features, device=first.a.device)
    b = torch.zeros(first.out_features, rank, device=first.b.device)
    for update, weight in zip(updates, weights, strict=True):
        share = weight * math.sqrt(abs(update.scaling))
        a[: update.rank] += share * update.a.float()
        b[:, : update.rank] += math.copysign(share, share * update.scaling) * update.b.float()
    return LowRank(a.to(first.a.dtype), b.to(first.b.dtype), 1.0, first.kind)


class Recompressed(NamedTuple):
    """An update of lower rank and what was lost: ``||delta - result|| / ||delta||`` (Frobenius)."""

    update: LowRank
    relative_error: float


def recompress(update: LowRank, rank: int) -> Recompressed:
    """Return the best update of at most ``rank`` (Eckart-Young), through QR of both factors; no dense delta is formed.

    A rank at or above ``min(R, I, O)`` keeps the delta and only balances the factors.
    """
    if rank < 1:
        raise IncompatibleError(f"rank must be at least 1, got {rank}")
    (a, b), error = compact(Factors(update.a.double(), update.b.double() * update.scaling), rank)
    return Recompressed(LowRank(a.to(update.a.dtype), b.to(update.b.dtype), 1.0, update.kind), error)
