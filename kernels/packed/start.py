"""Starting a Triton kernel with little work on the host where the same call came before."""

from __future__ import annotations

from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}


def start(
    kernel: Any, grid: tuple[int, ...], operands: tuple[Any, ...], *, warps: int, pdl: bool, **blocks: Any
) -> None:
    """Run ``kernel[grid](*operands, **blocks)``.

    Triton's own look-up of the compiled kernel costs 15 to 30 µs for that many arguments. Here the key is what it
    specialises on (dtypes, alignment of pointers, divisibility of numbers) and a hit starts the kernel at once.

    Args:
        kernel: A jitted function; its constants come last.
        grid: Programs, up to three dimensions.
        operands: Tensors, numbers or None, in the kernel's order.
        warps: Per program.
        pdl: Programmatic dependent launch.
        blocks: The kernel's constants, in any order.
    """
    constants = [blocks[name] for name in kernel.arg_names[len(operands) :]]
    key = (kernel, warps, pdl, *constants, *map(_kind, operands))
    found = _compiled.get(key)
    if found is not None:
        found[(*grid, 1, 1)[:3]](*operands, *constants)
        return
    launch = {"launch_pdl": True} if pdl else {}
    found = kernel[grid](*operands, **blocks, num_warps=warps, **launch)
    if found is not None:  # the interpreter compiles nothing
        _compiled[key] = found


def _kind(operand: Any) -> Any:
    """What Triton may specialise on."""
    if isinstance(operand, torch.Tensor):
        return operand.dtype, operand.device.index, operand.data_ptr() & 15
    if operand is None:
        return None
    return 1 if operand == 1 else (operand & 15 == 0, operand.bit_length() > 31)
