"""The one expert of highest score; ties go to the lower index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.routers.component import SiteShape
from compose.routers.selectors.top_k import take_top
from compose.routers.steps import SELECTORS, Seen, Selected


@SELECTORS.register("argmax")
@dataclass(frozen=True, kw_only=True)
class Argmax:
    """The best expert, weighted by its probability: top-1 (LLaVA-MoLE, arXiv:2401.16160; MOA, CoLoR)."""

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the selector of one site."""
        return _Argmax()


class _Argmax(nn.Module):
    def forward(self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Selected:
        """Probability of the best."""
        return take_top(logits, probs, 1)
