"""multislerp: the weighted mean direction of any number of deltas, at their weighted mean length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import length, normalised, norms
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("multislerp")
@dataclass(frozen=True, kw_only=True)
class MultiSlerp:
    """``(sum_n w_n ||delta_n||) * normalise(sum_n w_n delta_n / ||delta_n||)``.

    This is what mergekit's multislerp computes: its step in the tangent space at the weighted mean is identically 0
    (measured, 1e-7), so the projected mean is the result; `karcher` is the mean on the sphere. A delta of 0 has no
    direction and only shortens the result; directions that cancel give 0.

    Attributes:
        normalize_weights: Divide the weights by their sum first; without it the result grows with the weights.
    """

    normalize_weights: bool = True
    contract: ClassVar[Contract] = Contract(
        summary="weighted mean direction at the weighted mean norm", paper="mergekit (multislerp)", homogeneous=False
    )

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the mean.

        Raises:
            IncompatibleError: Weights are to be normalised and sum to 0.
        """
        weights = normalised(deltas, "multislerp") if self.normalize_weights else deltas.weights
        gram = deltas.gram.cpu()
        lengths = norms(gram)
        directions = (weights / lengths).where(lengths > 0, 0.0)
        reached = length(gram, directions)
        scale = float((weights * lengths).sum()) / reached if reached else 0.0
        return deltas.combine(directions * scale)
