"""grouped_lora: every batch row, or every token, runs through its own adapter.

Shape letters: ``B`` batch, ``T`` tokens, ``D`` in, ``O`` out.
"""

from __future__ import annotations

from typing import Literal

import torch

from compose.errors import IncompatibleError
from compose.kernels.checks import autocast_dtype, check_id_range, check_operands, check_precision, resolve_backend
from compose.kernels.grouped_lora import cpu, reference, triton
from compose.kernels.grouped_lora.plan import GroupPlan, check_ids, plan_groups
from compose.kernels.slices import SlicedStack, slice_by_slice
from compose.kernels.stack import LoraStack

__all__ = ["BACKENDS", "GroupPlan", "grouped_lora", "plan_groups"]

BACKENDS = {"triton": triton, "cpu": cpu, "reference": reference}


def grouped_lora(
    x: torch.Tensor,
    stack: LoraStack | SlicedStack,
    ids: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    plan: GroupPlan | None = None,
    backend: str = "auto",
    reuse_base: bool = False,
    input_precision: Literal["ieee", "tf32"] = "ieee",
    batch_invariant: bool = True,
) -> torch.Tensor:
    """Return ``y = base + s_e B_e A_e x`` with ``e`` the id of each row or token.

    Differentiable in ``x``, ``base`` and the stack's factors and scaling. Under autocast everything is cast to its
    dtype.

    Args:
        x: ``(B, D)`` or ``(B, T, D)``, in the stack's dtype.
        stack: Adapters of this target; ranks may differ and be 0. Of several targets with one input (`SlicedStack`):
            ``O`` is the width of all their outputs side by side.
        ids: int64 ``(B,)``, or ``(B, T)`` with ``x (B, T, D)``; -1 = no adapter.
        base: ``(B, O)`` or ``(B, T, O)``, the frozen layer's output. None: the update alone.
        plan: ``plan_groups(ids)``, made once and passed to every layer; without it each call makes its own. The Triton
            backend needs none and reads ``ids`` anew in every call (and in every replay of a CUDA graph).
        backend: ``"auto"`` (Triton on CUDA where it can run, else ``"cpu"``), ``"triton"``, ``"cpu"`` (fast torch
            code, any device) or ``"reference"``.
        reuse_base: Allow the result to be written over ``base``, also where autograd allows it; for callers that
            own it. By default ``base`` is never written to and the result is new memory.
        input_precision: Of float32 products under Triton: ``"ieee"``, or ``"tf32"`` (about three decimal digits).
        batch_invariant: Under Triton an example has the same bits in every batch: a row of ``x (B, D)``, or a row of
            ``x (B, T, D)`` with its tokens. False: more than 512 rows may share larger blocks, which is faster where
            thousands of rows are tokens rather than examples.

    Raises:
        IncompatibleError: Shapes, dtypes or devices do not fit, or an id is out of range. While ``torch.compile``
            traces, and under Triton, the range is checked only when a plan is given; other ids then count as none.
        UnknownNameError: No such backend.
        BackendUnavailableError: The named backend cannot run these operands.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, stack, base = x.to(dtype), stack.cast(dtype), None if base is None else base.to(dtype)
    check_operands("grouped_lora", x, stack, base)
    check_ids(ids)
    if ids.shape != x.shape[: ids.dim()] or ids.dim() >= x.dim() or ids.device != x.device:
        raise IncompatibleError(
            f"grouped_lora: ids for x {tuple(x.shape)} must be {tuple(x.shape[:1])} or {tuple(x.shape[:-1])} "
            f"on {x.device}, got {tuple(ids.shape)} on {ids.device}"
        )
    module = resolve_backend("grouped_lora", backend, BACKENDS, x, stack)
    if plan is None and module is not triton and not torch.compiler.is_compiling():
        plan = plan_groups(ids)
    if plan is not None:
        if plan.ids.shape != ids.shape:
            raise IncompatibleError(
                f"grouped_lora: the plan is for ids {tuple(plan.ids.shape)}, got ids {tuple(ids.shape)}; plan again"
            )
        check_id_range("grouped_lora", plan.lowest, plan.highest, stack.num_adapters)
    if module is triton:
        check_precision("grouped_lora", input_precision)
        return triton.forward(
            x, stack, ids, base=base, plan=plan, reuse_base=reuse_base, precision=input_precision,
            batch_invariant=batch_invariant,
        )  # fmt: skip
    if isinstance(stack, SlicedStack):
        return slice_by_slice(stack, base, lambda one, part: module.forward(x, one, ids, base=part, plan=plan))
    return module.forward(x, stack, ids, base=base, plan=plan, reuse_base=reuse_base)
