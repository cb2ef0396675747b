"""A multi-layer gate: X-LoRA's classifier."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.linear import Init, initial
from compose.routers.steps import GATES, Seen


@GATES.register("mlp")
@dataclass(frozen=True, kw_only=True)
class MlpGate:
    """``depth`` linear layers with ReLU and dropout between them (X-LoRA, arXiv:2402.07148).

    Attributes:
        depth: 1 is one linear layer.
        hidden: Width of the inner layers.
        dropout: After every inner layer, in training.
        bias: Whether the layers have biases (0 at the start).
        init: Of every layer's weight; see `LinearGate`.
        std: Of ``init="normal"``.
    """

    depth: int = 1
    hidden: int = 2048
    dropout: float = 0.2
    bias: bool = True
    init: Init = "kaiming"
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.depth < 1 or self.hidden < 1 or not 0 <= self.dropout < 1:
            raise IncompatibleError(
                f"depth and hidden must be at least 1 and dropout in [0, 1), got {self.depth}, {self.hidden}, "
                f"{self.dropout}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        widths = [shape.in_features, *[self.hidden] * (self.depth - 1), shape.num_experts]
        layers: list[nn.Module] = []
        for place, (width, out) in enumerate(pairwise(widths)):
            if place:
                layers += [nn.ReLU(), nn.Dropout(self.dropout)]
            linear = nn.Linear(width, out, bias=self.bias)
            with torch.no_grad():
                linear.weight.copy_(initial(self.init, out, width, self.std, shape.generator))
                if self.bias:
                    linear.bias.zero_()
            layers.append(linear)
        return MlpScores(nn.Sequential(*layers))


class MlpScores(nn.Module):
    """The gate of one site."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (..., D)`` -> logits ``(..., E)``."""
        assert seen.x is not None  # noqa: S101 - the specification demands an input for this gate
        return self.layers(seen.x.to(next(self.parameters()).dtype))

    def product(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """As `compose.routers.gates.linear.LinearScores.product`: of a single layer."""
        only = self.layers[0]
        return (only.weight, only.bias) if len(self.layers) == 1 and type(only) is nn.Linear else None
