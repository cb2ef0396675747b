"""A gate per token that also reads the prompt as one vector, through one hidden layer.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width, ``H`` hidden, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.linear import initial
from compose.routers.steps import GATES, Seen


@GATES.register("prompt_mlp")
@dataclass(frozen=True, kw_only=True)
class PromptMlpGate:
    """``V relu(W n(x) + U n(p) + b) + c``: ``x`` a token's state, ``p`` the prompt's, ``n`` a layer norm, no scale.

    A token alone often cannot tell the task: its state in early layers, or in a base that ignores the instruction,
    says little of it. The prompt's mean does.

    Attributes:
        hidden: ``H``.
        std: Of the initial ``V``; 0: uniform gates at the start.
    """

    reads_prompt: ClassVar[bool] = True

    hidden: int = 1024
    std: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.std < 0:
            raise IncompatibleError(f"hidden must be at least 1 and std >= 0, got {self.hidden}, {self.std}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        token, prompt = (
            initial("kaiming", self.hidden, width, 0.0, shape.generator)
            for width in (shape.in_features, shape.prompt_features)
        )
        return _PromptMlp(token, prompt, initial("normal", shape.num_experts, self.hidden, self.std, shape.generator))


class _PromptMlp(nn.Module):
    def __init__(self, token_HD: torch.Tensor, prompt_HD: torch.Tensor, out_EH: torch.Tensor) -> None:
        super().__init__()
        self.token_HD, self.prompt_HD = nn.Parameter(token_HD), nn.Parameter(prompt_HD)
        self.bias_H = nn.Parameter(torch.zeros(len(token_HD)))
        self.out_EH, self.out_bias_E = nn.Parameter(out_EH), nn.Parameter(torch.zeros(len(out_EH)))

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (B, T, D)`` or ``(B, D)``, and ``prompt (B, D)`` -> logits ``(..., E)``."""
        assert seen.x is not None and seen.prompt is not None  # noqa: S101, PT018 - the specification demands both
        token = nn.functional.linear(self._normed(seen.x), self.token_HD, self.bias_H)
        prompt = nn.functional.linear(self._normed(seen.prompt), self.prompt_HD)
        hidden = token + (prompt if token.dim() == prompt.dim() else prompt.unsqueeze(1))
        return nn.functional.linear(torch.relu(hidden), self.out_EH, self.out_bias_E)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.token_HD.dtype)
        return nn.functional.layer_norm(x, x.shape[-1:])
