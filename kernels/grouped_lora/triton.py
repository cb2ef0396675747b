"""Triton backend of ``grouped_lora``; its kernels lie in ``compose.kernels.packed``."""

from __future__ import annotations

import torch

from compose.kernels.grouped_lora.plan import GroupPlan
from compose.kernels.packed.front import forward as packed_forward
from compose.kernels.packed.front import supports
from compose.kernels.slices import SlicedStack
from compose.kernels.stack import LoraStack

__all__ = ["forward", "supports"]


def forward(
    x: torch.Tensor,
    stack: LoraStack | SlicedStack,
    ids: torch.Tensor,
    *,
    base: torch.Tensor | None,
    plan: GroupPlan | None,
    reuse_base: bool = False,
    precision: str = "ieee",
    batch_invariant: bool = True,
) -> torch.Tensor:
    """See ``op.grouped_lora``. Nothing is read on the host; ids outside the stack count as none."""
    tables = None if plan is None else plan.tables
    ids_NK = ids.reshape(-1, 1)
    return packed_forward(
        x, stack, ids_NK, None, base=base, reuse_base=reuse_base, precision=precision, batch_invariant=batch_invariant,
        tables=tables,
    )  # fmt: skip
