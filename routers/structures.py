"""Experts that are no plain stack of factors: one shared A (HydraLoRA), output vectors (MoV), mixed in splits (MHR).

Shape letters: ``B`` rows, ``T`` tokens, ``D`` in, ``O`` out, ``E`` experts, ``r`` rank of one expert, ``S`` splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.kernels.checks import autocast_dtype
from compose.kernels.lowrank import lowrank
from compose.routers.routing import Routing

if TYPE_CHECKING:
    from compose.routers.session import Attached
    from compose.routers.spec import MixtureSpec


def make_structures(
    attached: Attached, spec: MixtureSpec, targets: Sequence[str], *, seed: int
) -> dict[str, nn.Module]:
    """Return target -> experts, where they are no plain stack; empty for ordinary low-rank experts.

    Args:
        attached: The attached model.
        spec: Its ``structure`` and ``splits`` decide.
        targets: Routed targets.
        seed: Not used by structures that start from the bank.

    Raises:
        IncompatibleError: The bank's factors or widths do not allow it.
    """
    if spec.structure in ("lora", "ffn") and spec.splits == 1:
        return {}
    kind: Any = {"shared_a": SharedA, "ia3": OutputVectors}.get(spec.structure)
    if kind is not None:
        return {target: kind(attached.layers[target]) for target in targets}
    return {target: Split(attached.layers[target], spec.splits) for target in targets}


class SharedA(nn.Module):
    """HydraLoRA (arXiv:2404.19245): ``y = base + s Σ_e g_e B_e A x`` with one A.

    It starts from the bank's factors, whose A must be the same for all experts (``fresh_experts(init="tied")``), and
    trains A once and every B.

    Attributes:
        a_rD: Shared.
        b_ErO: One per expert.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        stack = layer.stack
        ranks, scalings = set(stack.ranks), set(stack.scaling_E.tolist())
        if len(ranks) != 1 or len(scalings) != 1:
            raise IncompatibleError(
                f"{layer.target}: experts with one shared A need one rank and scaling, got {ranks}"
            )
        a_ErD = stack.a_RD.detach().unflatten(0, (stack.num_adapters, -1))
        if not torch.equal(a_ErD, a_ErD[:1].expand_as(a_ErD)):
            raise IncompatibleError(
                f"{layer.target}: the experts' A factors differ; make them with fresh_experts(..., init='tied')"
            )
        self.a_rD = nn.Parameter(a_ErD[0].clone())
        self.b_ErO = nn.Parameter(stack.b_RO.detach().unflatten(0, (stack.num_adapters, -1)).clone())
        self.scaling = scalings.pop()

    def forward(self, x: torch.Tensor, call: Any, routing: Routing) -> torch.Tensor:
        """``x (..., D)`` -> ``(..., O)``; gates with fewer dimensions are repeated."""
        dtype = autocast_dtype(x) or torch.promote_types(x.dtype, self.a_rD.dtype)
        gates = _spread(routing.dense() * self.scaling, x).to(dtype)
        h = nn.functional.linear(x.to(dtype), self.a_rD.to(dtype))
        u = (gates.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)
        y = u @ self.b_ErO.to(dtype).flatten(0, 1)
        return y.to(x.dtype) if call.base is None else call.base + y.to(call.base.dtype)

    def export_(self, layer: Any) -> None:
        """Write the trained factors into the layer's stack, expert by expert."""
        experts = len(self.b_ErO)
        with torch.no_grad():
            layer.a_RD.copy_(self.a_rD.repeat(experts, 1))
            layer.b_RO.copy_(self.b_ErO.flatten(0, 1))


class OutputVectors(nn.Module):
    """MoV (arXiv:2309.05444): ``y = (Σ_e g_e l_e) ⊙ W x``; the vectors start at 1, so do sums of gates at 1.

    Attributes:
        l_EO: One vector per expert.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.l_EO = nn.Parameter(torch.ones(layer.stack.num_adapters, layer.out_features))
        self.target = layer.target

    def forward(self, x: torch.Tensor, call: Any, routing: Routing) -> torch.Tensor:
        """``base (..., O)`` -> the same, scaled."""
        if call.base is None:
            raise IncompatibleError(f"{self.target}: vectors scale the base layer's output; there is none here")
        scale = _spread(routing.dense(), x).to(self.l_EO.dtype) @ self.l_EO
        return call.base * scale.to(call.base.dtype)

    def export_(self, layer: Any) -> None:
        """Vectors have no low-rank form; they stay in the router's file."""


class Split(nn.Module):
    """MHR (arXiv:2211.03831): blocks of the widths mix factors apart: gates ``(..., S E)``, one set per split.

    ``Ã = concat_s Σ_e g_se A_e[:, block s]`` and the same for B over blocks of the output; then ``y = base + B̃ Ã x``.
    The factors are the bank's (parameters where they train). Equal ranks are needed, and widths that ``S`` divides.
    """

    def __init__(self, layer: Any, splits: int) -> None:
        super().__init__()
        stack = layer.stack
        if len(set(stack.ranks)) != 1:
            raise IncompatibleError(
                f"{layer.target}: mixing in splits needs equal ranks, got {sorted(set(stack.ranks))}"
            )
        if layer.in_features % splits or layer.out_features % splits:
            raise IncompatibleError(
                f"{layer.target}: {splits} splits must divide its widths {layer.in_features} and {layer.out_features}"
            )
        self.splits = splits

    def forward(self, x: torch.Tensor, call: Any, routing: Routing) -> torch.Tensor:
        """``x (B, D)`` or ``(B, T, D)``, gates ``(S E)`` or ``(B, S E)`` -> ``(..., O)``."""
        a, b = self.factors(call.stack, routing)
        base, dtype = call.base, autocast_dtype(x)
        if dtype is not None:
            x, a, b, base = x.to(dtype), a.to(dtype), b.to(dtype), None if base is None else base.to(dtype)
        flat = x.dim() == 2
        x_BTD = x.unsqueeze(1) if flat else x
        base = base.unsqueeze(1) if flat and base is not None else base
        y = lowrank(x_BTD, a, b, 1.0, base)
        return y.squeeze(1) if flat else y

    def factors(self, stack: Any, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixed ``Ã (..., r, D)`` and ``B̃ (..., r, O)``, scalings included."""
        gates = routing.dense().unflatten(-1, (self.splits, stack.num_adapters)).to(stack.a_RD.dtype)
        root = stack.scaling_E.abs().sqrt().to(gates.dtype)
        a = self._mixed(stack.a_RD, gates * root, stack.num_adapters)
        b = self._mixed(stack.b_RO, gates * root * stack.scaling_E.sign().to(gates.dtype), stack.num_adapters)
        return a, b

    def _mixed(self, factor_RW: torch.Tensor, gates: torch.Tensor, experts: int) -> torch.Tensor:
        """``(R, W)`` and ``(..., S, E)`` -> ``(..., r, W)``."""
        blocks = factor_RW.unflatten(0, (experts, -1)).unflatten(-1, (self.splits, -1))  # (E, r, S, w)
        return torch.einsum("...se,ersw->...rsw", gates, blocks).flatten(-2)

    def export_(self, layer: Any) -> None:
        """The factors are the bank's own already."""


def _spread(gates: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gates ``(E,)``, ``(B, E)`` or ``(B, T, E)`` with the dimensions of ``x`` before the last."""
    while gates.dim() < x.dim():
        gates = gates.unsqueeze(-2) if gates.dim() > 1 else gates.unsqueeze(0)
    return gates
