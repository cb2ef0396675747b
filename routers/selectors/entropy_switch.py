"""DynMoLE: all experts where the gate is undecided, a nucleus where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.entropy import tsallis, tsallis_maximum
from compose.routers.selectors.top_p import keep, nucleus
from compose.routers.steps import SELECTORS, Seen, Selected


@SELECTORS.register("entropy_switch")
@dataclass(frozen=True, kw_only=True)
class EntropySwitch:
    """All experts where the Tsallis entropy, as a share of its maximum, is above ``threshold``; else `TopP`.

    Gates are the probabilities, 0 for the others. Defaults of DynMoLE's code (its abstract is the source otherwise).
    Not copied: ``1e-5`` added to probabilities, and its nucleus without the expert that reaches ``p``.

    Attributes:
        threshold: In [0, 1); at 0 every decision that is not certain takes all.
        q: Entropic index, positive; 1 is Shannon's entropy.
        p: Of the nucleus.
        at_least: Of the nucleus.
    """

    threshold: float = 0.9
    q: float = 1.1
    p: float = 0.75
    at_least: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1 or not self.q > 0:
            raise IncompatibleError(f"threshold must lie in [0, 1) and q be positive, got {self.threshold}, {self.q}")
        if not 0 < self.p <= 1 or self.at_least < 1:
            raise IncompatibleError(f"p must lie in (0, 1] and at_least be >= 1, got {self.p}, {self.at_least}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the selector of one site."""
        most = tsallis_maximum(int(shape.available_E.sum()), self.q)
        return _EntropySwitch(self.threshold * most, self.q, self.p, self.at_least)


class _EntropySwitch(nn.Module):
    def __init__(self, level: float, q: float, p: float, at_least: int) -> None:
        super().__init__()
        self.level, self.q, self.p, self.at_least = level, q, p, at_least

    def forward(self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Selected:
        """Probabilities of those who take part, 0 for the others."""
        undecided = tsallis(probs.detach(), self.q)[..., None] > self.level
        inside = nucleus(probs, available_E, self.p, self.at_least)
        return keep((inside | undecided) & available_E, logits, probs)
