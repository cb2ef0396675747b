"""Poly's relaxed Bernoulli gates, divided by their sum (arXiv:2202.13914, 2211.03831)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import NORMALISATIONS, Normalised, Seen


@NORMALISATIONS.register("relaxed_bernoulli")
@dataclass(frozen=True, kw_only=True)
class RelaxedBernoulli:
    """``z / Σ z``: in training ``z = sigmoid((logits + log u - log(1 - u)) / τ)`` with uniform ``u``, else sigmoid.

    The temperature applies in training only, as in the authors' code and PEFT's. ``u`` comes from torch's global
    state, as dropout's numbers do, so checkpointed layers draw the same when they are computed again; a static or task
    gate draws once per forward. Gates sum to 1 unless every ``z`` is below ``1e-12``.

    Attributes:
        temperature: τ, positive.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise IncompatibleError(f"temperature must be positive, got {self.temperature}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the normalisation of one site."""
        return _RelaxedBernoulli(self.temperature)


class _RelaxedBernoulli(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Normalised:
        """Scores, ``-inf`` for missing experts -> shares."""
        if seen.training:
            eps = torch.finfo(logits.dtype).eps
            uniform = torch.rand_like(logits).clamp(eps, 1 - eps)
            logits = (logits + uniform.log() - torch.log1p(-uniform)) / self.temperature
        active = torch.sigmoid(logits)
        return Normalised(active / active.sum(-1, keepdim=True).clamp(min=1e-12), scores=logits)
