"""Checks and casts that both ops make before any backend runs."""

from __future__ import annotations

import logging
from functools import lru_cache
from types import ModuleType

import torch

from compose.errors import BackendUnavailableError, IncompatibleError, UnknownNameError
from compose.kernels.slices import SlicedStack
from compose.kernels.stack import LoraStack


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype autocast asks for on the device of ``x``; None when it is off. Like torch, it leaves float64 alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_operands(op: str, x: torch.Tensor, stack: LoraStack | SlicedStack, base: torch.Tensor | None) -> None:
    """Refuse operands whose shapes, dtypes or devices do not fit together.

    Raises:
        IncompatibleError: Names the op, what was given and what is allowed.
    """
    if isinstance(stack, SlicedStack):
        a, b, scaling, out = stack.a_RD, stack.b_flat, stack.scaling_SE, stack.out_features
    else:
        a, b, scaling, out = stack.a_RD, stack.b_RO, stack.scaling_E, stack.b_RO.shape[1]
    if x.dim() not in (2, 3) or x.shape[-1] != a.shape[1]:
        raise IncompatibleError(
            f"{op}: x must be (B, {a.shape[1]}) or (B, T, {a.shape[1]}) for this stack, got {tuple(x.shape)}"
        )
    if not x.dtype == a.dtype == b.dtype:
        raise IncompatibleError(
            f"{op}: x and both factors need one dtype, got {x.dtype}, {a.dtype}, {b.dtype}; cast one of them"
        )
    if not x.device == a.device == b.device == scaling.device:
        raise IncompatibleError(
            f"{op}: x is on {x.device}, the stack on {a.device}, {b.device} and {scaling.device}; move one"
        )
    if base is None:
        return
    expected = (*x.shape[:-1], out)
    if base.shape != expected or base.dtype != x.dtype or base.device != x.device:
        raise IncompatibleError(
            f"{op}: base must be {expected} {x.dtype} on {x.device}, "
            f"got {tuple(base.shape)} {base.dtype} on {base.device}"
        )


def check_id_range(op: str, lowest: int, highest: int, num_adapters: int) -> None:
    """Refuse adapter numbers outside ``[-1, num_adapters)``; -1 stands for "no adapter".

    Raises:
        IncompatibleError: An id is out of range.
    """
    if lowest < -1 or highest >= num_adapters:
        bad = lowest if lowest < -1 else highest
        raise IncompatibleError(
            f"{op}: adapter id {bad} is out of range; allowed are -1 (none) and 0 to {num_adapters - 1}"
        )


def check_precision(op: str, precision: str) -> None:
    """Refuse anything but ``"ieee"`` and ``"tf32"``.

    Raises:
        UnknownNameError: Another name.
    """
    if precision not in ("ieee", "tf32"):
        raise UnknownNameError(f"{op}: unknown input_precision {precision!r}; known: ieee, tf32")


_INTERPRETED = "the operands are not on a CUDA device"


@lru_cache(maxsize=256)
def _log_once(op: str, backend: str, reason: str) -> None:
    """Say why ``"auto"`` passed a backend over."""
    logging.getLogger("compose.kernels").info("%s: backend %r is not used: %s", op, backend, reason)


def resolve_backend(
    op: str, name: str, table: dict[str, ModuleType], x: torch.Tensor, stack: LoraStack | SlicedStack
) -> ModuleType:
    """The backend module called ``name``; ``"auto"`` takes the first of ``table`` that supports the operands.

    Raises:
        UnknownNameError: No backend has this name.
        BackendUnavailableError: The named backend cannot run these operands; the message gives its reason.
    """
    if name == "auto":
        for candidate, module in table.items():
            reason = _INTERPRETED if candidate == "triton" and not x.is_cuda else module.supports(x, stack)
            if reason is None:
                return module
            if not torch.compiler.is_compiling():
                _log_once(op, candidate, reason)
    if name not in table:
        raise UnknownNameError(f"{op}: unknown backend {name!r}; known: auto, {', '.join(table)}")
    reason = table[name].supports(x, stack)
    if reason is not None:
        raise BackendUnavailableError(f"{op}: backend {name!r} cannot run here: {reason}; use backend='auto'")
    return table[name]
