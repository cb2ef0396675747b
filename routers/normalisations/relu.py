"""Positive parts of the scores (ReMoE, arXiv:2412.14711)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.routers.component import SiteShape
from compose.routers.steps import NORMALISATIONS, Normalised, Seen


@NORMALISATIONS.register("relu")
@dataclass(frozen=True, kw_only=True)
class Relu:
    """``max(logits, 0)``: sparse and differentiable; all experts of a decision may be 0."""

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the normalisation of one site."""
        return _Relu()


class _Relu(nn.Module):
    def forward(self, logits: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Normalised:
        """Scores, ``-inf`` for missing experts -> values >= 0."""
        return Normalised(torch.relu(logits))
