"""Triton backend of ``mixture_lora``, outputs combined; its kernels lie in ``compose.kernels.packed``."""

from __future__ import annotations

import torch

from compose.kernels.mixture_lora.plan import MixturePlan
from compose.kernels.packed.front import forward as packed_forward
from compose.kernels.packed.front import supports
from compose.kernels.slices import SlicedStack
from compose.kernels.stack import LoraStack

__all__ = ["forward", "supports"]


def forward(
    x: torch.Tensor,
    stack: LoraStack | SlicedStack,
    gates: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    base: torch.Tensor | None,
    plan: MixturePlan | None = None,
    reuse_base: bool = False,
    precision: str = "ieee",
    batch_invariant: bool = True,
) -> torch.Tensor:
    """See ``op.mixture_lora``. Nothing is read on the host; indices outside the stack count as none."""
    width = gates.shape[-1]
    ids_NK = None if indices is None else indices.reshape(-1, width)
    tables = None if plan is None or indices is None else plan.sorted_tables(indices)
    return packed_forward(
        x,
        stack,
        ids_NK,
        gates.reshape(-1, width),
        base=base,
        reuse_base=reuse_base,
        precision=precision,
        batch_invariant=batch_invariant,
        tables=tables,
    )
