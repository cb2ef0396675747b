"""The linear gate ``W x`` in float32: MoLoRA, MoLA, MixLoRA, MeteoRA and most others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import GATES, Seen

Init = Literal["zeros", "normal", "kaiming"]


@GATES.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearGate:
    """Scores ``W x (+ b)``.

    Attributes:
        init: ``"zeros"`` (uniform gates at the start), ``"normal"``, or ``"kaiming"`` (uniform, a = sqrt 5).
        std: Of ``"normal"``.
        bias: Whether there is a bias (0 at the start).
        layer_norm: Normalise the input first (no learned scale), as SMEAR (arXiv:2306.03745).
    """

    init: Init = "kaiming"
    std: float = 0.02
    bias: bool = False
    layer_norm: bool = False

    def __post_init__(self) -> None:
        if self.init not in ("zeros", "normal", "kaiming") or self.std < 0:
            raise IncompatibleError(
                f"init must be zeros, normal or kaiming and std >= 0, got {self.init!r}, {self.std}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        weight_ED = initial(self.init, shape.num_experts, shape.in_features, self.std, shape.generator)
        return LinearScores(weight_ED, torch.zeros(shape.num_experts) if self.bias else None, self.layer_norm)


class LinearScores(nn.Module):
    """The linear gate of one site.

    Attributes:
        weight_ED: Trained.
        bias_E: Trained; None without.
        layer_norm: Whether the input is normalised first.
    """

    def __init__(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, layer_norm: bool) -> None:
        super().__init__()
        self.weight_ED = nn.Parameter(weight_ED)
        self.bias_E = None if bias_E is None else nn.Parameter(bias_E)
        self.layer_norm = layer_norm

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (..., D)`` -> logits ``(..., E)``."""
        assert seen.x is not None  # noqa: S101 - the specification demands an input for this gate
        x = seen.x.to(self.weight_ED.dtype)
        if self.layer_norm:
            x = nn.functional.layer_norm(x, x.shape[-1:])
        return nn.functional.linear(x, self.weight_ED, self.bias_E)

    def product(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight ``(E, D)`` and bias ``(E,)`` where logits are that product and no more; else None."""
        return None if self.layer_norm else (self.weight_ED, self.bias_E)


def initial(init: Init, out: int, width: int, std: float, generator: torch.Generator) -> torch.Tensor:
    """Initial weights ``(out, width)`` in float32."""
    if init == "zeros":
        return torch.zeros(out, width)
    if init == "normal":
        return torch.randn(out, width, generator=generator) * std
    bound = 1 / math.sqrt(width)  # kaiming_uniform with a = sqrt 5
    return (torch.rand(out, width, generator=generator) * 2 - 1) * bound
