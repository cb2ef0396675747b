"""subtract_general: what adapters have in common is subtracted from each before they are added."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("subtract_general")
@dataclass(frozen=True, kw_only=True)
class SubtractGeneral:
    """``sum_n w_n (delta_n - share * general)``: general knowledge subtraction (GenKnowSub, arXiv:2505.10939).

    The paper subtracts an adapter trained on general text, with ``share = 1``; name it with ``general``. Without one,
    general knowledge is the plain mean of all adapters, those of weight 0 included (ours): give the whole bank and
    weights to the few that are wanted. PEFT's Arrow (``use_gks``) subtracts averages of ``A`` and of ``B``, which is
    not a difference of updates; this is exact on deltas, a combination of rank ``sum R_n``. With ``share = 1`` and the
    mean, equal weights give 0.

    Attributes:
        general_share: How much of the general delta is subtracted; 0 is `sum`.
        general: Name of the adapter that is the general one; its own weight is not used.
    """

    general_share: float = 1.0
    general: str | None = None
    contract: ClassVar[Contract] = Contract(
        summary="weighted sum after subtracting what the adapters share",
        paper="arXiv:2505.10939",
        neutral={"general_share": 0.0},
    )

    def __post_init__(self) -> None:
        if not math.isfinite(self.general_share):
            raise ValueError(f"general_share must be a finite number, got {self.general_share}")

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the sum of the residuals.

        Raises:
            IncompatibleError: No adapter is called ``general``.
        """
        if self.general is None:
            general = torch.full_like(deltas.weights, 1 / len(deltas))
            weights = deltas.weights
        elif self.general in deltas.names:
            general = torch.tensor([float(name == self.general) for name in deltas.names], dtype=torch.float64)
            weights = deltas.weights * (1 - general)
        else:
            raise IncompatibleError(
                f"{deltas.target or 'a target'}: no adapter is called {self.general!r} here, so it cannot be the "
                f"general one; there are {', '.join(deltas.names)}"
            )
        return deltas.combine(weights - self.general_share * float(weights.sum()) * general)
