"""norm_match: the weighted sum, rescaled to the mean length of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import length, norms
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("norm_match")
@dataclass(frozen=True, kw_only=True)
class NormMatch:
    """``lambda * sum_n w_n delta_n``, ``lambda = mean_n ||delta_n|| / ||sum_n w_n delta_n||``.

    The direction is that of `sum`, the length the mean over the adapters of non-zero weight, so that merging neither
    shrinks nearly orthogonal updates nor blows up aligned ones. The weights' common scale has no effect. A sum of 0
    has no direction; the result is 0.
    """

    contract: ClassVar[Contract] = Contract(
        summary="weighted sum rescaled to the mean norm of its adapters", paper="norm matching", homogeneous=False
    )

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the rescaled sum, of rank ``sum R_n``."""
        gram = deltas.gram.cpu()
        reached = length(gram, deltas.weights)
        used = deltas.weights != 0
        scale = float(norms(gram)[used].mean()) / reached if reached else 0.0
        return deltas.combine(deltas.weights * scale)
