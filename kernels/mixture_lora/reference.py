"""Reference of ``mixture_lora``: loops over adapters in plain torch. Slow, obviously right, any dtype and device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compose.kernels.mixture_lora.plan import MixturePlan
from compose.kernels.slots import live_ranks
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
    """Both sums of ``op.mixture_lora``, adapter by adapter; gates with indices are added up in their own order.

    So a result depends on the adapters a row names and not on the numbers they have in the stack.
    """
    y = x.new_zeros(*x.shape[:-1], stack.b_RO.shape[1]) if base is None else base + 0.0
    ranks = live_ranks(stack)
    rows = [slice(first, first + rank) for first, rank in zip(stack.offsets, ranks, strict=False)]
    scaling = [stack.scaling_E[adapter].to(x.dtype) for adapter in range(stack.num_adapters)]
    if combine == "outputs":

        def output(adapter: int) -> torch.Tensor:
            return scaling[adapter] * (x @ stack.a_RD[rows[adapter]].T @ stack.b_RO[rows[adapter]])

        return _add_gated(y, output, gates, indices, stack.num_adapters)
    widest = max(ranks, default=0)

    def shrunk(adapter: int) -> torch.Tensor:
        root = scaling[adapter].abs().sqrt()
        return torch.nn.functional.pad(root * (x @ stack.a_RD[rows[adapter]].T), (0, widest - ranks[adapter]))

    h = _add_gated(x.new_zeros(*x.shape[:-1], widest), shrunk, gates, indices, stack.num_adapters)

    def expanded(adapter: int) -> torch.Tensor:
        root = scaling[adapter].abs().sqrt() * scaling[adapter].sign()
        return root * (h[..., : ranks[adapter]].contiguous() @ stack.b_RO[rows[adapter]])

    return _add_gated(y, expanded, gates, indices, stack.num_adapters)


def _add_gated(
    total: torch.Tensor,
    update: Callable[[int], torch.Tensor],
    gates: torch.Tensor,
    indices: torch.Tensor | None,
    num_adapters: int,
) -> torch.Tensor:
    """``total + Σ g_e update(e)``; an adapter chosen twice counts twice."""
    if indices is None:
        for adapter in range(num_adapters):
            total = total + _per_token(gates[..., adapter], total) * update(adapter)
        return total
    parts = [torch.zeros_like(total)] * gates.shape[-1]
    for adapter in range(num_adapters):
        one = update(adapter)
        for place, part in enumerate(parts):
            chosen = _per_token(indices[..., place] == adapter, total)
            parts[place] = part + torch.where(chosen, _per_token(gates[..., place], total) * one, 0.0)
    for part in parts:
        total = total + part
    return total


def _per_token(gate: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Spread ``()``, ``(B,)`` or ``(B, T)`` to the dimensions of ``like``, in its dtype unless it is a mask."""
    while gate.dim() < like.dim():
        gate = gate.unsqueeze(-1)
    return gate if gate.dtype == torch.bool else gate.to(like.dtype)
