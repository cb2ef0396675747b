"""Reference of ``grouped_lora``: a loop over adapters in plain torch. Slow, obviously right, any dtype and device."""

from __future__ import annotations

import torch

from compose.kernels.grouped_lora.plan import GroupPlan
from compose.kernels.slots import live_ranks
from compose.kernels.stack import LoraStack


def supports(x: torch.Tensor, stack: LoraStack) -> str | None:
    """It runs everything."""
    return None


def forward(
    x: torch.Tensor,
    stack: LoraStack,
    ids: torch.Tensor,
    *,
    base: torch.Tensor | None,
    plan: GroupPlan | None = None,
    reuse_base: bool = False,
) -> torch.Tensor:
    """``y = base + Σ_e [id = e] s_e B_e A_e x``; see ``op.grouped_lora``."""
    y = x.new_zeros(*x.shape[:-1], stack.b_RO.shape[1]) if base is None else base + 0.0
    ids = ids if ids.dim() == x.dim() - 1 else ids[:, None]
    for adapter, rank in enumerate(live_ranks(stack)):
        rows = slice(stack.offsets[adapter], stack.offsets[adapter] + rank)
        scaling = stack.scaling_E[adapter].to(x.dtype)
        delta = (x @ stack.a_RD[rows].T * scaling) @ stack.b_RO[rows]
        y = y + torch.where((ids == adapter)[..., None], delta, 0.0)
    return y
