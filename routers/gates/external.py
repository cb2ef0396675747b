"""Scores that come from outside the model: a classifier of sentences, as DLP-LoRA's (arXiv:2410.01497).

Shape letters: ``B`` rows, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import GATES, Seen


@GATES.register("external")
@dataclass(frozen=True, kw_only=True)
class ExternalGate:
    """The scores themselves, handed in where text embeddings are: ``text_embedding (B, E)``, in the bank's order.

    Build with ``text_features=`` the number of experts. The classifier that makes them stays outside: it is not saved.
    """

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        if shape.in_features != shape.num_experts:
            raise IncompatibleError(
                f"scores from outside are one per expert: build with text_features={shape.num_experts}, "
                f"got {shape.in_features}"
            )
        return _External()


class _External(nn.Module):
    def forward(self, seen: Seen) -> torch.Tensor:
        """Scores ``(B, E)``."""
        if seen.text is None:
            raise IncompatibleError(
                "the gate 'external' reads scores handed in as text_embedding; use gate_input='text'"
            )
        return seen.text
