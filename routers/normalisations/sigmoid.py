"""Sigmoid of the scores: experts do not compete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import NORMALISATIONS, Normalised, Seen


@NORMALISATIONS.register("sigmoid")
@dataclass(frozen=True, kw_only=True)
class Sigmoid:
    """``sigmoid(logits / temperature)``, each in (0, 1), 0 for missing experts; their sum is free.

    Attributes:
        temperature: Positive.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise IncompatibleError(f"temperature must be positive, got {self.temperature}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the normalisation of one site."""
        return _Sigmoid(self.temperature)


class _Sigmoid(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Normalised:
        """Scores, ``-inf`` for missing experts -> values in [0, 1)."""
        scores = logits / self.temperature
        return Normalised(torch.sigmoid(scores), scores=scores)
