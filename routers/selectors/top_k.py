"""The k experts of highest score; ties go to the lower index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import SELECTORS, Seen, Selected


@SELECTORS.register("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK:
    """Keep ``k`` experts per decision (all of a site that has fewer).

    Attributes:
        k: How many; a tuple gives every layer its own, as MoLA (arXiv:2402.08562), repeated in equal parts along the depth.
    """

    k: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        if any(k < 1 for k in self.per_layer):
            raise IncompatibleError(f"k must be at least 1, got {self.k}")

    @property
    def per_layer(self) -> tuple[int, ...]:
        """``k`` as a tuple."""
        return (self.k,) if isinstance(self.k, int) else self.k

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the selector of one site."""
        place = max(0, shape.layer) * len(self.per_layer) // max(1, shape.num_layers)
        return _TopK(min(self.per_layer[place], int(shape.available_E.sum())))


class _TopK(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(
        self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor
    ) -> Selected:
        """Probabilities of the chosen, best first."""
        return take_top(logits, probs, self.k)


def take_top(logits: torch.Tensor, probs: torch.Tensor, k: int) -> Selected:
    """Keep the ``k`` highest logits per decision, best first; equal ones by index, lower first."""
    ids = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[..., :k]
    return Selected(probs.gather(-1, ids), ids, logits.gather(-1, ids))
