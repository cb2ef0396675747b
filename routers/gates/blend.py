"""A gate per token and a gate per sequence, blended by depth (HMoRA, ICLR 2025; its code at 5215d21).

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width, ``E`` experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.linear import initial
from compose.routers.steps import GATES, Seen

_ABSENT = -1e30  # finite, so that experts a site lacks pass a gradient of 0 instead of nan


@GATES.register("blend")
@dataclass(frozen=True, kw_only=True)
class BlendGate:
    """``p = (1 - m) softmax(W x + b) + m softmax(V t + c)``; ``t`` is the prompt as one vector.

    The scores are ``log p``, so a softmax at temperature 1 gives ``p`` itself. ``m = sigmoid(alpha)``; alpha is a
    parameter of each site that starts at ``-depth`` in the first layer and at ``+depth`` in the last: tokens decide
    early, the task decides late.

    Attributes:
        depth: See above.
        shift: Added to every alpha at the start.
        bias: Whether the two linear maps have biases (0 at the start).
        dropout: Of both inputs, in training.
    """

    reads_prompt: ClassVar[bool] = True

    depth: float = 2.0
    shift: float = 0.0
    bias: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1 or not math.isfinite(self.depth + self.shift):
            raise IncompatibleError(
                "dropout must lie in [0, 1), depth and shift be finite; "
                f"got {self.dropout}, {self.depth}, {self.shift}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        place = max(0, shape.layer) / max(1, shape.num_layers - 1)
        weights = [
            initial("kaiming", shape.num_experts, width, 0.0, shape.generator)
            for width in (shape.in_features, shape.prompt_features)
        ]
        return _Blend(weights, self.bias, self.dropout, self.depth * (2 * place - 1) + self.shift, shape.available_E)


class _Blend(nn.Module):
    available_E: torch.Tensor

    def __init__(
        self, weights: list[torch.Tensor], bias: bool, dropout: float, alpha: float, available_E: torch.Tensor
    ) -> None:
        super().__init__()
        self.token_ED, self.prompt_ED = (nn.Parameter(weight) for weight in weights)
        experts = len(available_E)
        self.token_bias_E = nn.Parameter(torch.zeros(experts)) if bias else None
        self.prompt_bias_E = nn.Parameter(torch.zeros(experts)) if bias else None
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("available_E", available_E, persistent=False)

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (B, T, D)``, or ``(B, D)`` of a layer without tokens, and ``prompt (B, D)`` -> logits ``(..., E)``."""
        assert seen.x is not None and seen.prompt is not None  # noqa: S101, PT018 - the specification demands both
        tokens = self._logs(seen.x, self.token_ED, self.token_bias_E)
        prompt_BE = self._logs(seen.prompt, self.prompt_ED, self.prompt_bias_E)
        while prompt_BE.dim() < tokens.dim():
            prompt_BE = prompt_BE.unsqueeze(-2)
        log = nn.functional.logsigmoid
        return torch.logaddexp(tokens + log(-self.alpha), prompt_BE + log(self.alpha))

    def _logs(self, x: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        scores = nn.functional.linear(self.dropout(x.to(weight_ED.dtype)), weight_ED, bias_E)
        return torch.log_softmax(scores.masked_fill(~self.available_E, _ABSENT), dim=-1)
