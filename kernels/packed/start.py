"""Starting a Triton kernel with little work on the host where the same call came before."""

from __future__ import annotations

from typing import Any

import torch

_INT32 = 2**31 - 1
_compiled: dict[tuple[Any, ...], Any] = {}


def start(
    kernel: Any, grid: tuple[int, ...], operands: tuple[Any, ...], *, warps: int, pdl: bool, **blocks: Any
) -> None:
    """Run ``kernel[grid](*operands, **blocks)``.

    Triton's own look-up of the compiled kernel costs 15 to 30 µs for that many arguments. Here the key is what it
    specialises on (dtypes, alignment of pointers, divisibility of numbers) and a hit starts the kernel at once, with
    addresses in place of tensors, which spares the launcher a question to the driver for each of them.

    Args:
        kernel: A jitted function; its constants come last.
        grid: Programs, up to three dimensions.
        operands: Tensors, numbers or None, in the kernel's order; the first one is a tensor on the device.
        warps: Per program.
        pdl: Programmatic dependent launch.
        blocks: The kernel's constants, in any order.
    """
    kinds: list[Any] = []
    plain: list[Any] = []
    bits = 0
    for operand in operands:
        if operand is None:
            plain.append(None)
            kinds.append(None)
        elif operand.__class__ is int:
            plain.append(operand)
            kinds.append(1 if operand == 1 else (operand & 15 == 0, operand > _INT32))
        else:
            address = operand.data_ptr()
            bits |= address
            plain.append(address)
            kinds.append(operand.dtype)
    if bits & 15:
        kinds += [one.data_ptr() & 15 == 0 for one in operands if isinstance(one, torch.Tensor)]
    key = (id(kernel), operands[0].device.index, warps, pdl, tuple(blocks.items()), tuple(kinds))
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*plain, *constants)
        return
    launch = {"launch_pdl": True} if pdl else {}
    compiled = kernel[grid](*operands, **blocks, num_warps=warps, **launch)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled, [blocks[name] for name in kernel.arg_names[len(operands) :]]
