"""Nucleus selection: the fewest experts that hold a share of the probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import SELECTORS, Seen, Selected


@SELECTORS.register("top_p")
@dataclass(frozen=True, kw_only=True)
class TopP:
    """Keep the most probable experts until their mass reaches ``p``, the one that reaches it included.

    Equal probabilities go by index. Gates are the probabilities, 0 for the others. MoE-PEFT's code leaves out the
    expert that reaches ``p``; this is the usual nucleus. DLP-LoRA (arXiv:2410.01497) renormalises by a second softmax.

    Attributes:
        p: In (0, 1]; 1 keeps all.
        at_least: As many experts are kept in any case, or all of a site that has fewer.
    """

    p: float = 0.8
    at_least: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1 or self.at_least < 1:
            raise IncompatibleError(f"p must lie in (0, 1] and at_least be >= 1, got {self.p}, {self.at_least}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the selector of one site."""
        return _TopP(self.p, self.at_least)


class _TopP(nn.Module):
    def __init__(self, p: float, at_least: int) -> None:
        super().__init__()
        self.p, self.at_least = p, at_least

    def forward(self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Selected:
        """Probabilities of the nucleus, 0 for the others."""
        return keep(nucleus(probs, available_E, self.p, self.at_least), logits, probs)


def nucleus(probs: torch.Tensor, available_E: torch.Tensor, p: float, at_least: int) -> torch.Tensor:
    """Which experts are in the nucleus: bool ``(..., E)``; missing ones never are."""
    ordered, places = torch.sort(probs.detach().masked_fill(~available_E, -1), dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    inside = before < p if p < 1 else torch.ones_like(before, dtype=torch.bool)
    inside[..., :at_least] = True
    return torch.zeros_like(inside).scatter(-1, places, inside) & available_E


def keep(taken: torch.Tensor, logits: torch.Tensor, gates: torch.Tensor) -> Selected:
    """Dense gates with 0, and scores with ``-inf``, where an expert is not taken."""
    return Selected(gates.masked_fill(~taken, 0), None, logits.masked_fill(~taken, float("-inf")))
