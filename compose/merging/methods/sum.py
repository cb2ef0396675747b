"""sum: the weighted sum of the deltas, exact, by concatenation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compose.merging.deltas import Deltas, Factors
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("sum")
@dataclass(frozen=True, kw_only=True)
class Sum:
    """``sum_n w_n delta_n``: task arithmetic (arXiv:2212.04089) of adapters; rank ``sum R_n``, any signs."""

    contract: ClassVar[Contract] = Contract(
        summary="exact weighted sum, factors side by side (the default)", paper="arXiv:2212.04089"
    )

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the sum; adapters of weight 0 are left out."""
        return deltas.combine(deltas.weights)
