"""Softmax of the scores, at a fixed or learned temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import NORMALISATIONS, Normalised, Seen


@NORMALISATIONS.register("softmax")
@dataclass(frozen=True, kw_only=True)
class Softmax:
    """``softmax(logits / temperature)`` over the experts that exist at the site.

    Attributes:
        temperature: Positive.
        learned: Whether the temperature is trained (its logarithm is the parameter), as MoLE (arXiv:2404.13628).
    """

    temperature: float = 1.0
    learned: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise IncompatibleError(f"temperature must be positive, got {self.temperature}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the normalisation of one site."""
        return _Softmax(self.temperature, self.learned)


class _Softmax(nn.Module):
    def __init__(self, temperature: float, learned: bool) -> None:
        super().__init__()
        self.temperature = temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learned else None

    def forward(self, logits: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Normalised:
        """Scores, ``-inf`` for missing experts -> probabilities."""
        if self.log_temperature is not None:
            missing = logits == float("-inf")  # times a parameter it would give the parameter no finite gradient
            logits = (logits.masked_fill(missing, 0) * torch.exp(-self.log_temperature)).masked_fill(
                missing, float("-inf")
            )
        elif self.temperature != 1.0:
            logits = logits / self.temperature
        return Normalised(torch.softmax(logits, dim=-1), scores=logits)
