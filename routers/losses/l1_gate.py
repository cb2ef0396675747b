"""L1 norm of gates (AM-LoRA, arXiv:2409.19611)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from compose.routers.losses.means import counted, of_available, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("l1_gate")
@dataclass(frozen=True, kw_only=True)
class L1Gate(AbstractLoss):
    """``mean Σ_e |g_e|``, or of scores.

    Optimum 0. Gates that sum to 1 (softmax) have the constant 1: there it acts on scores only. The paper is known here
    by its abstract ("L1 on the attention"); its coefficient is not.

    Attributes:
        of: ``"gates"`` or ``"logits"``.
    """

    of: Literal["gates", "logits"] = "gates"

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        return [] if self.of in ("gates", "logits") else [f"of must be gates or logits, got {self.of!r}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        values_NE = decisions.gates_NE if self.of == "gates" else decisions.logits_NE
        size_N = of_available(values_NE, decisions).abs().sum(1)
        mean, _ = world_mean(size_N[:, None], counted(decisions, self.over), world_sum)
        return mean.squeeze(0)
