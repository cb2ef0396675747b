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
        k: How many; a tuple gives every equal part of the depth its own, as MoLA (arXiv:2402.08562).
        selection_bias: Rank experts by probability plus a bias per expert, a saved buffer without gradient that starts
            at 0 and that `compose.routers.balance` moves (arXiv:2408.15664; SMoRA). Gates do not contain it.
    """

    k: int | tuple[int, ...] = 2
    selection_bias: bool = False

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
        bias_E = torch.zeros(shape.num_experts) if self.selection_bias else None
        return _TopK(min(self.per_layer[place], int(shape.available_E.sum())), bias_E)


class _TopK(nn.Module):
    selection_bias_E: torch.Tensor | None

    def __init__(self, k: int, bias_E: torch.Tensor | None = None) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("selection_bias_E", bias_E)

    def forward(self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Selected:
        """Probabilities of the chosen, best first."""
        if self.selection_bias_E is None:
            return take_top(logits, probs, self.k)
        biased = (probs + self.selection_bias_E).masked_fill(logits == float("-inf"), float("-inf"))
        return take_top(logits, probs, self.k, biased)


def best(order: torch.Tensor, k: int) -> torch.Tensor:
    """int64 ``(..., k)``: where ``order (..., E)`` is highest, best first; of equal ones the lower index first."""
    return order.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def take_top(logits: torch.Tensor, probs: torch.Tensor, k: int, order: torch.Tensor | None = None) -> Selected:
    """Keep the ``k`` experts of highest ``order`` (default: logits) per decision, best first.

    Equal ones go by index, lower first.
    """
    ids = best(logits if order is None else order, k)
    return Selected(probs.gather(-1, ids), ids, logits.gather(-1, ids))
