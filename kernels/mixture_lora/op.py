"""mixture_lora: every batch, row or token runs through its own gated sum of adapters.

Shape letters: ``B`` batch, ``T`` tokens, ``D`` in, ``O`` out, ``E`` adapters, ``K`` chosen per entry.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import torch

from compose.errors import BackendUnavailableError, IncompatibleError, UnknownNameError
from compose.kernels.checks import autocast_dtype, check_id_range, check_operands, check_precision, resolve_backend
from compose.kernels.mixture_lora import cpu, reference, triton
from compose.kernels.mixture_lora.plan import MixturePlan
from compose.kernels.slices import SlicedStack, slice_by_slice
from compose.kernels.stack import LoraStack

__all__ = ["BACKENDS", "MixturePlan", "mixture_lora"]

BACKENDS = {"triton": triton, "cpu": cpu, "reference": reference}

Combine = Literal["outputs", "parameters"]


def mixture_lora(  # noqa: PLR0913 - one parameter per part of the formula
    x: torch.Tensor,
    stack: LoraStack | SlicedStack,
    gates: torch.Tensor,
    indices: torch.Tensor | None = None,
    *,
    base: torch.Tensor | None = None,
    combine: Combine = "outputs",
    plan: MixturePlan | None = None,
    backend: str = "auto",
    reuse_base: bool = False,
    input_precision: Literal["ieee", "tf32"] = "ieee",
    batch_invariant: bool = True,
) -> torch.Tensor:
    """Return ``base`` plus a gated mixture of adapters.

    ``"outputs"``: ``y = base + Σ_e g_e s_e B_e A_e x``.
    ``"parameters"``: ``y = base + (Σ_e g_e sgn(s_e) √|s_e| B_e)(Σ_e g_e √|s_e| A_e) x``, ranks padded with zero rows
    to the largest; with equal scalings it is LoRAHub's ``s (Σ g B)(Σ g A) x`` (arXiv 2307.13269).

    Differentiable in ``x``, ``gates``, ``base`` and the stack's factors and scaling. Under autocast everything is cast
    to its dtype.

    Args:
        x: ``(B, D)`` or ``(B, T, D)``, in the stack's dtype.
        stack: Adapters of this target; ranks may differ and be 0. Of several targets with one input (`SlicedStack`):
            ``O`` is the width of all their outputs side by side.
        gates: ``(E,)``, ``(B, E)`` or, with ``x (B, T, D)``, ``(B, T, E)``; any float dtype, any sign.
        indices: int64 of the same shape as ``gates``, whose last dimension is then ``K``: the adapters the gates
            belong to. An adapter named twice counts twice; -1 contributes nothing.
        base: ``(B, O)`` or ``(B, T, O)``, the frozen layer's output. None: the mixture alone.
        combine: What is summed; two different functions, so never guessed.
        plan: Keeps what follows from gates, indices and stack between calls; one plan per set of gates and indices.
        backend: ``"auto"`` (Triton on CUDA where it can run, else ``"cpu"``), ``"triton"`` (outputs combined),
            ``"cpu"`` (fast torch code, any device) or ``"reference"``.
        reuse_base: Allow the result to be written over ``base``, also where autograd allows it; for callers that
            own it. By default ``base`` is never written to and the result is new memory.
        input_precision: Of float32 products under Triton: ``"ieee"``, or ``"tf32"`` (about three decimal digits).
        batch_invariant: Under Triton an example has the same bits in every batch: a row of ``x (B, D)``, or a row of
            ``x (B, T, D)`` with its tokens. False: more than 512 rows may share larger blocks, which is faster where
            thousands of rows are tokens rather than examples.

    Raises:
        IncompatibleError: Shapes, dtypes or devices do not fit, or an index is out of range (checked on CPU tensors
            while nothing is traced; elsewhere torch's own bounds check applies).
        UnknownNameError: No such backend or way to combine.
        BackendUnavailableError: The named backend cannot run these operands.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, stack, base = x.to(dtype), stack.cast(dtype), None if base is None else base.to(dtype)
    if combine not in ("outputs", "parameters"):
        raise UnknownNameError(f"mixture_lora: unknown combine {combine!r}; known: outputs, parameters")
    check_operands("mixture_lora", x, stack, base)
    _check_gates(x, stack, gates, indices)
    table = BACKENDS if combine == "outputs" else _of_parameters(backend)
    module = resolve_backend("mixture_lora", backend, table, x, stack)
    if module is triton:
        check_precision("mixture_lora", input_precision)
        return triton.forward(
            x, stack, gates, indices, base=base, plan=plan, reuse_base=reuse_base, precision=input_precision,
            batch_invariant=batch_invariant,
        )  # fmt: skip
    if isinstance(stack, SlicedStack):
        return slice_by_slice(
            stack,
            base,
            lambda one, part: module.forward(x, one, gates, indices, base=part, combine=combine, plan=plan),
        )
    return module.forward(x, stack, gates, indices, base=base, combine=combine, plan=plan, reuse_base=reuse_base)


def _of_parameters(backend: str) -> dict[str, ModuleType]:
    """The backends that combine parameters."""
    if backend == "triton":
        raise BackendUnavailableError(
            "mixture_lora: backend 'triton' combines outputs only; use backend='auto' for combine='parameters'"
        )
    return {name: module for name, module in BACKENDS.items() if module is not triton}


def _check_gates(
    x: torch.Tensor, stack: LoraStack | SlicedStack, gates: torch.Tensor, indices: torch.Tensor | None
) -> None:
    """Refuse gates or indices that do not fit ``x`` and the stack."""
    dims = gates.dim()
    if not 1 <= dims <= x.dim() or (dims > 1 and gates.shape[:-1] != x.shape[: dims - 1]):
        width = stack.num_adapters if indices is None else "K"
        allowed = [f"({', '.join(map(str, (*x.shape[:dims], width)))})" for dims in range(x.dim())]
        raise IncompatibleError(
            f"mixture_lora: gates for x {tuple(x.shape)} must be {' or '.join(allowed)}, got {tuple(gates.shape)}"
        )
    if not gates.is_floating_point() or gates.device != x.device:
        raise IncompatibleError(
            f"mixture_lora: gates must be floating point on {x.device}, got {gates.dtype} on {gates.device}"
        )
    if indices is None:
        if gates.shape[-1] != stack.num_adapters:
            raise IncompatibleError(
                f"mixture_lora: the stack has {stack.num_adapters} adapters, "
                f"gates {tuple(gates.shape)} have {gates.shape[-1]}"
            )
        return
    if indices.dtype != torch.int64 or indices.shape != gates.shape or indices.device != gates.device:
        raise IncompatibleError(
            f"mixture_lora: indices must be int64 {tuple(gates.shape)} on {gates.device} like the gates, "
            f"got {indices.dtype} {tuple(indices.shape)} on {indices.device}"
        )
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        lowest, highest = torch.aminmax(indices)
        check_id_range("mixture_lora", int(lowest), int(highest), stack.num_adapters)
