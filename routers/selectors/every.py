"""All experts take part: soft mixtures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.routers.component import SiteShape
from compose.routers.steps import SELECTORS, Seen, Selected


@SELECTORS.register("all")
@dataclass(frozen=True, kw_only=True)
class All:
    """Every expert takes part with its probability."""

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the selector of one site."""
        return _All()


class _All(nn.Module):
    def forward(self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Selected:
        """Probabilities as gates."""
        return Selected(probs, None, logits)
