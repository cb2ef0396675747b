"""mean: the weighted average of the deltas, exact, by concatenation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import normalised
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("mean")
@dataclass(frozen=True, kw_only=True)
class Mean:
    """``sum_n w_n delta_n / sum_n w_n``: a model soup (arXiv:2203.05482) of adapters; rank ``sum R_n``.

    The average is of deltas, not of factors (`linear_factors` is the latter). Weights are relative: only their ratios
    matter, and negative ones are allowed as long as the sum is not 0.
    """

    contract: ClassVar[Contract] = Contract(
        summary="exact weighted average, weights normalised to sum 1", paper="arXiv:2203.05482", homogeneous=False
    )

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the average.

        Raises:
            IncompatibleError: The weights sum to 0.
        """
        return deltas.combine(normalised(deltas, "mean"))
