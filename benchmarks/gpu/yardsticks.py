# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN202 - Triton reads its own annotations
"""Two kernels that say what the machine allows: ``null`` does nothing, ``stream`` moves the bytes and no more."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

STREAM_SHAPES = ((512, 2), (1024, 4), (4096, 4), (8192, 8))  # 4-byte words per program, warps


def null_call(device: str) -> Callable[[], object]:
    """Return a launch of one program that does nothing."""
    word = torch.zeros(1, dtype=torch.int32, device=device)
    return lambda: _null_kernel[(1,)](word)


def stream_calls(
    bytes_read: int, bytes_written: int, copies: int, device: str, shape: tuple[int, int]
) -> list[Callable[[], object]]:
    """Return ``copies`` launches, each over memory of its own: read ``bytes_read``, write ``bytes_written`` of them.

    What is written is read first, as ``base`` is; of the rest each program stores one word.
    """
    block, warps = shape
    updated, rest = bytes_written // 4, max(0, bytes_read - bytes_written) // 4
    programs_updating, programs_reading = triton.cdiv(updated, block), triton.cdiv(rest, block)
    aligned = triton.cdiv(updated + rest, 64) * 64
    memory = torch.ones(copies, aligned, dtype=torch.int32, device=device)
    sums = torch.zeros(programs_reading + 1, dtype=torch.int32, device=device)
    grid = (programs_updating + programs_reading,)
    return [
        lambda words=words: _stream_kernel[grid](
            words, sums, updated, updated + rest, programs_updating, BLOCK=block, num_warps=warps
        )
        for words in memory
    ]


@triton.jit
def _null_kernel(word_ptr):
    pass


@triton.jit
def _stream_kernel(words_ptr, sums_ptr, updated, total, programs_updating, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    if program < programs_updating:
        places = program * BLOCK + tl.arange(0, BLOCK)
        inside = places < updated
        tl.store(words_ptr + places, tl.load(words_ptr + places, mask=inside, other=0) + 1, mask=inside)
    else:
        places = updated + (program - programs_updating) * BLOCK + tl.arange(0, BLOCK)
        words = tl.load(words_ptr + places, mask=places < total, other=0)
        tl.store(sums_ptr + program - programs_updating, tl.sum(words))
