"""The residual of a base weight whose parts became experts: GOAT (arXiv:2502.16894; its code at ef4d21a).

Experts that start as parts of ``W`` would count these parts twice, so the base becomes ``W - mean_e s_e B_e A_e`` of
the initial factors. Here nothing of the base is edited: the difference is computed beside it from frozen copies of the
factors, so switching the router off, detaching it, or an interruption at any point leaves the model as it was.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` in, ``O`` out, ``R`` rank rows of all experts, ``E`` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.stack import LoraStack


class StartResidual(nn.Module):
    """Subtracts the mean of the experts' initial updates from the base output.

    Attributes:
        a_RD: A factors at the start; saved with the mixture, so that it loads beside trained experts.
        b_RO: B factors at the start.
    """

    a_RD: torch.Tensor
    b_RO: torch.Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        stack: LoraStack = layer.stack
        self.register_buffer("a_RD", stack.a_RD.detach().clone())
        self.register_buffer("b_RO", stack.b_RO.detach().clone())
        self.target = layer.target

    def forward(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        """``x (B, D)`` or ``(B, T, D)`` -> the call's base output ``(..., O)`` less the mean."""
        stack: LoraStack = call.stack
        if call.base is None:
            raise IncompatibleError(f"{self.target}: there is no base output that experts could be parts of")
        start = self.start(stack)
        here_E = stack.present().float()
        return mixture_lora(
            x, start, -here_E / here_E.sum().clamp_min(1.0), base=call.base, backend=call.backend,
            reuse_base=call.owns_base,
        )  # fmt: skip

    def start(self, stack: LoraStack) -> LoraStack:
        """The factors at the start, with the scalings and ranks of those of now."""
        return LoraStack(self.a_RD, self.b_RO, stack.scaling_E, stack.ranks, stack.index)
