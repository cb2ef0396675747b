"""robustmerge: pruned factors, compensated rank by rank and averaged across adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import balanced
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("robustmerge")
@dataclass(frozen=True, kw_only=True)
class RobustMerge:
    """RobustMerge (arXiv:2502.17159): ``scale * (sum_n S_n B~_n / sum_n S_n) (sum_n A~_n)``, rank row by rank row.

    ``A~`` and ``B~`` keep the largest entries of each factor; ``S_nj = sum|A_nj| / sum|A~_nj|`` makes up for what
    pruning took from row ``j`` and is raised to at least its ``att_ratio`` quantile from the top over the adapter's
    rows. Row ``j`` of one adapter is added to row ``j`` of another, so the product has cross terms ``B_n A_m``.

    The published code works on the factors as trained, so its result depends on how a delta is split into factors.
    Here each delta first takes its balanced gauge (compact SVD, so row ``j`` is its ``j``-th strongest direction,
    signs made canonical, see `balanced`); ``gauge="given"`` is the published choice, with the scaling folded into
    ``B``. Other differences: ``int(density * entries)`` entries survive where the code keeps one more; a row of ``A``
    that pruning empties takes the adapter's largest finite ``S`` (the code divides by 0); ranks may differ: rows that
    an adapter does not have are zero rows and do not enter ``sum_n S_n``. The update ``w_n delta_n`` is what enters:
    ``sqrt|w_n|`` on each factor, the sign on ``B``; adapters of weight 0 are left out. The published merge weighs
    every adapter alike.

    Attributes:
        density: Share of the entries kept in each factor, in (0, 1].
        att_ratio: Share of the rows whose ``S`` is used as it is, in (0, 1]; smaller ones are raised to them.
        scale: Of the product, above 0; the code has a factor 2 on each of the two factors.
        gauge: ``"balanced"`` or ``"given"``.
    """

    density: float = 0.2
    att_ratio: float = 0.2
    scale: float = 4.0
    gauge: Literal["balanced", "given"] = "balanced"
    contract: ClassVar[Contract] = Contract(
        summary="pruned, compensated and averaged factors in balanced gauge",
        paper="arXiv:2502.17159",
        neutral={"density": 1.0, "scale": 1.0},
    )

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is the share of entries kept and must be in (0, 1], got {self.density}")
        if not 0 < self.att_ratio <= 1:
            raise ValueError(f"att_ratio must be in (0, 1], got {self.att_ratio}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0, got {self.scale}")
        if self.gauge not in ("balanced", "given"):
            raise ValueError(f"gauge must be 'balanced' or 'given', got {self.gauge!r}")

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the merged factors, of the largest rank among the adapters."""
        parts = [self._factors(deltas, n) for n in range(len(deltas)) if deltas.weights[n] != 0]
        rank = max((len(part.a) for part in parts), default=0)
        out, width = deltas.shape
        a, b = deltas.a[0].new_zeros(rank, width), deltas.b[0].new_zeros(out, rank)
        total = a.new_zeros(rank)
        for part in parts:
            own = len(part.a)
            pruned = _prune(part.a, self.density)
            strength = _compensation(part.a, pruned, self.att_ratio)
            a[:own] += pruned
            b[:, :own] += strength * _prune(part.b, self.density)
            total[:own] += strength
        return Factors(a, b * (self.scale / total))

    def _factors(self, deltas: Deltas, n: int) -> Factors:
        weight = float(deltas.weights[n])
        a, b = deltas.a[n], deltas.b[n]
        if self.gauge == "balanced":
            a, b = balanced(a, b)
        root = math.sqrt(abs(weight))
        return Factors(a * root, b * math.copysign(root, weight))


def _prune(factor: torch.Tensor, density: float) -> torch.Tensor:
    """Return ``factor`` with all but its ``int(density * entries)`` largest entries (at least 1) set to 0."""
    kept = max(int(density * factor.numel()), 1)
    if kept >= factor.numel():
        return factor
    threshold = factor.abs().flatten().kthvalue(factor.numel() - kept + 1).values
    return factor.where(factor.abs() >= threshold, 0.0)


def _compensation(a: torch.Tensor, pruned: torch.Tensor, att_ratio: float) -> torch.Tensor:
    """Return ``S (R)``, at least 1."""
    whole, left = a.abs().sum(dim=1), pruned.abs().sum(dim=1)
    strength = torch.where(left > 0, whole / left, 1.0)
    if not len(strength):
        return strength
    strength = strength.where((left > 0) | (whole == 0), strength.max())
    ordered = strength.sort().values
    return strength.clamp(min=ordered[min(int(len(a) * (1 - att_ratio)), len(a) - 1)])
