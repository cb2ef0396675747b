"""LoRA-Mixer's hard-soft routing, in a provisional reading (arXiv:2507.00029)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.selectors.top_k import take_top
from compose.routers.steps import SELECTORS, Seen, Selected


@SELECTORS.register("hard_soft_top_k")
@dataclass(frozen=True, kw_only=True)
class HardSoftTopK:
    """Values of top-k, gradients of the soft mixture: every expert's probability gets one, chosen or not.

    Only the abstract was read ("a differentiable hard-soft top-k routing scheme"); the straight-through estimator is
    our reading of it and may differ from the paper. In training gates are dense, those of experts that were not chosen
    are 0 in value; at eval it is top-k. Renormalisation by sum scales the straight-through gradients with the values.

    Attributes:
        k: How many experts take part.
    """

    k: int = 2

    def __post_init__(self) -> None:
        if self.k < 1:
            raise IncompatibleError(f"k must be at least 1, got {self.k}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the selector of one site."""
        return _HardSoftTopK(min(self.k, int(shape.available_E.sum())))


class _HardSoftTopK(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Selected:
        """Probabilities of the chosen."""
        selected = take_top(logits, probs, self.k)
        if not seen.training or selected.expert_ids is None:
            return selected
        taken = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, selected.expert_ids, True)
        hard = probs.detach().masked_fill(~taken, 0)
        return Selected(hard + (probs - probs.detach()), None, logits.masked_fill(~taken, float("-inf")))
