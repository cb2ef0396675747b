"""LoGo's second signal: an expert whose output is peaked is sure of itself (arXiv:2511.07129).

Shape letters: ``B`` rows, ``E`` experts, ``O`` out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.expert_outputs import expert_outputs, one_vector_per_sequence
from compose.routers.steps import GATES, Seen


@GATES.register("output_entropy")
@dataclass(frozen=True, kw_only=True)
class OutputEntropyGate:
    """Scores ``1 / (H(softmax(s_e B_e A_e x)) + epsilon)``, for one vector per sequence.

    Attributes:
        epsilon: Keeps an output of entropy 0 finite; 1e-6 in the authors' code.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise IncompatibleError(f"epsilon must be positive, got {self.epsilon}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        return _OutputEntropy(self.epsilon)


class _OutputEntropy(nn.Module):
    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (B, D)`` -> scores ``(B, E)``."""
        x = one_vector_per_sequence(seen.x, "output_entropy")
        assert seen.stack is not None  # noqa: S101 - the session hands the factors on
        log_BEO = torch.log_softmax(expert_outputs(x, seen.stack), dim=-1)
        return 1.0 / (-(log_BEO.exp() * log_BEO).sum(-1) + self.epsilon)
