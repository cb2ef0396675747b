"""Scores as gates: static coefficients, learned tables without a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.routers.component import SiteShape
from compose.routers.steps import NORMALISATIONS, Normalised, Seen


@NORMALISATIONS.register("identity")
@dataclass(frozen=True, kw_only=True)
class Identity:
    """The scores themselves, of any sign; 0 for missing and dropped experts."""

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the normalisation of one site."""
        return _Identity()


class _Identity(nn.Module):
    def forward(self, logits: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Normalised:
        """Scores, ``-inf`` for missing experts -> scores, 0 for missing experts."""
        return Normalised(logits.masked_fill(logits == float("-inf"), 0))
