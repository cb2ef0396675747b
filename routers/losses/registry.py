"""The registry of auxiliary losses and what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from compose.registry import Registry
from compose.routers.routing import Decisions


class AuxLoss(Protocol):
    """A frozen dataclass of options; called with the decisions of one site it returns a float32 scalar.

    Attributes:
        coefficient: Multiplies the value, averaged over sites.
        over: ``"real"``: all but padding; ``"response"``: labelled tokens only.
        needs_inputs: Whether `Decisions.x_ND` and ``stack`` are read.
        needs_labels: Whether expert labels are read.
    """

    coefficient: float
    over: str
    needs_inputs: bool
    needs_labels: bool

    def __call__(self, decisions: Decisions, world_sum: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the loss of one site; ``world_sum`` adds up counts over processes (identity in one)."""


LOSSES: Registry[type[AuxLoss]] = Registry("auxiliary loss", package="compose.routers.losses")
