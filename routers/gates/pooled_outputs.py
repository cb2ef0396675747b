"""MoLE's gate over the experts' outputs, pooled to one vector per sequence (after arXiv:2404.13628).

Shape letters: ``B`` rows, ``E`` experts, ``O`` out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.expert_outputs import expert_outputs, one_vector_per_sequence
from compose.routers.gates.linear import Init, initial
from compose.routers.steps import GATES, Seen


@GATES.register("pooled_outputs")
@dataclass(frozen=True, kw_only=True)
class PooledOutputsGate:
    """Scores ``W flat(norm([o_1 ... o_E]))`` with ``o_e = s_e B_e A_e mean(x)``, the mean of the expert's outputs.

    The outputs of all experts are concatenated, normalised together (layer normalisation without scale) and read by
    one linear layer: ``E^2 O`` parameters per site. As published the layer reads every token's outputs and has ``T``
    times as many parameters, bound to one length of text.

    Attributes:
        init: See `compose.routers.gates.linear.LinearGate`.
        std: Of ``init="normal"``.
    """

    init: Init = "normal"
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.init not in ("zeros", "normal", "kaiming") or self.std < 0:
            raise IncompatibleError(
                f"init must be zeros, normal or kaiming and std >= 0, got {self.init!r}, {self.std}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        width = shape.num_experts * shape.read_stack.b_RO.shape[1]
        return _PooledOutputs(initial(self.init, shape.num_experts, width, self.std, shape.generator))


class _PooledOutputs(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (B, D)`` -> scores ``(B, E)``."""
        x = one_vector_per_sequence(seen.x, "pooled_outputs")
        assert seen.stack is not None  # noqa: S101 - the session hands the factors on
        flat = expert_outputs(x, seen.stack).flatten(-2).to(self.weight.dtype)
        return nn.functional.linear(nn.functional.layer_norm(flat, flat.shape[-1:]), self.weight)
