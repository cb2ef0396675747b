"""Reference of ``mixture_lora``: loops over adapters in plain torch. Slow, obviously right, any dtype and device."""

from __future__ import annotations

import torch

from compose.kernels.mixture_lora.plan import MixturePlan
from compose.kernels.stack import LoraStack


def supports(x: torch.Tensor, stack: LoraStack) -> str | None:
    """It runs everything."""
    return None


def forward(
    x: torch.Tensor,
    stack: LoraStack,
    gates: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    base: torch.Tensor | None,
    combine: str,
    plan: MixturePlan | None = None,
    reuse_base: bool = False,
) -> torch.Tensor:
    """Both sums of ``op.mixture_lora``, adapter by adapter, with gates spread to one per token."""
    y = x.new_zeros(*x.shape[:-1], stack.b_RO.shape[1]) if base is None else base + 0.0
    gate = [_gate_of(adapter, gates, indices) for adapter in range(stack.num_adapters)]
    gate = [_per_token(values, x).to(x.dtype) for values in gate]
    if combine == "outputs":
        for adapter, g in enumerate(gate):
            rows = slice(stack.offsets[adapter], stack.offsets[adapter + 1])
            scaling = stack.scaling_E[adapter].to(x.dtype)
            y = y + g[..., None] * scaling * (x @ stack.a_RD[rows].T @ stack.b_RO[rows])
        return y
    h = x.new_zeros(*x.shape[:-1], stack.max_rank)
    for adapter, g in enumerate(gate):
        rows = slice(stack.offsets[adapter], stack.offsets[adapter + 1])
        root = stack.scaling_E[adapter].to(x.dtype).abs().sqrt()
        missing = stack.max_rank - stack.ranks[adapter]
        h = h + torch.nn.functional.pad(g[..., None] * root * (x @ stack.a_RD[rows].T), (0, missing))
    for adapter, g in enumerate(gate):
        rows = slice(stack.offsets[adapter], stack.offsets[adapter + 1])
        scaling = stack.scaling_E[adapter].to(x.dtype)
        root = scaling.abs().sqrt() * scaling.sign()
        y = y + g[..., None] * root * (h[..., : stack.ranks[adapter]] @ stack.b_RO[rows])
    return y


def _gate_of(adapter: int, gates: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """The gate of one adapter: ``()``, ``(B,)`` or ``(B, T)``; an adapter chosen twice counts twice."""
    if indices is None:
        return gates[..., adapter]
    return torch.where(indices == adapter, gates, 0.0).sum(-1)


def _per_token(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    while gate.dim() < x.dim() - 1:
        gate = gate.unsqueeze(-1)
    return gate
