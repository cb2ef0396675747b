# mypy: disable-error-code="no-untyped-def"
"""Slices: several outputs of one input (q, k and v; gate and up) that stand side by side in the columns of ``y``.

Rank rows lie slice by slice, so "sub-adapter" ``s E + e`` (slice ``s`` of adapter ``e``) owns a stretch of them.
Columns of ``h``: a dense ``h`` has one per rank row; with ids, an adapter fills the part of each slice from the left.

Letters: ``S`` slices, ``E`` adapters, ``R`` rank rows of all slices, ``J`` columns of ``h`` per token and slot.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from compose.kernels.packed.tuning import cdiv, rank_block
from compose.kernels.slices import SlicedStack

FIELDS = tl.constexpr(7)


class Slices(NamedTuple):
    """Where slices lie.

    Attributes:
        layout: ``(S, 7)`` int64: width, first column of ``y``, element of the flat second factor where rank row 0
            would be, first column of ``h`` with ids, columns of ``h`` with ids, first rank row, row after the last.
        rows_EJ: ``(E, J)`` int32: the rank row behind each column of ``h`` with ids, -1 for none.
        widths: Columns of ``y`` per slice.
        rows: Rank rows per slice.
        ranks: Largest rank per slice.
        blocks: Rank rows that kernels take at once, per slice.
    """

    layout: torch.Tensor
    rows_EJ: torch.Tensor
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    blocks: tuple[int, ...]

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of ``h`` with ids per slice."""
        return _columns(self.ranks, self.blocks)


def _columns(ranks: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """Of every slice the largest rank in whole blocks."""
    return tuple(cdiv(rank, block) * block for rank, block in zip(ranks, blocks, strict=True))


def slices_of(stack: SlicedStack) -> Slices:
    """Build the tables of a stack on the CPU and move them to its device."""
    ranks_SE, device = stack.ranks, stack.a_RD.device
    rows, ranks = tuple(sum(own) for own in ranks_SE), tuple(max((0, *own)) for own in ranks_SE)
    blocks = tuple(rank_block(own) for own in ranks_SE)
    columns = _columns(ranks, blocks)
    first_row, first_column = [0, *accumulate(rows)], [0, *accumulate(columns)]
    first_y = [0, *accumulate(stack.widths)]
    first_value = [0, *accumulate(own * width for own, width in zip(rows, stack.widths, strict=True))]
    layout = [
        [width, first_y[s], first_value[s] - first_row[s] * width, first_column[s], columns[s], first_row[s],
         first_row[s + 1]]
        for s, width in enumerate(stack.widths)
    ]  # fmt: skip
    rows_EJ = [[-1] * first_column[-1] for _ in range(stack.num_adapters)]
    row = 0
    for s, own in enumerate(ranks_SE):
        for line, rank in zip(rows_EJ, own, strict=True):
            line[first_column[s] : first_column[s] + rank] = range(row, row + rank)
            row += rank
    table = torch.tensor(rows_EJ, dtype=torch.int32, device=device).view(stack.num_adapters, first_column[-1])
    return Slices(torch.tensor(layout, device=device), table, stack.widths, rows, ranks, blocks)


@triton.jit
def slice_of(block, layout_ptr, y_width, BN: tl.constexpr, SLICES: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a block of ``BN`` columns lies: slice, first column in it, its width, offsets in ``y`` and in the factor.

    ``ALIGNED``: widths are multiples of 16, and so are offsets.
    """
    if SLICES > 1:
        number = 0
        before = 0
        total = 0
        for s in tl.static_range(SLICES - 1):
            total += tl.cdiv(tl.load(layout_ptr + s * FIELDS), BN).to(tl.int32)
            number = tl.where(block >= total, s + 1, number)
            before = tl.where(block >= total, total, before)
        line = layout_ptr + number * FIELDS
        width = tl.load(line)
        y_offset = tl.load(line + 1)
        w_offset = tl.load(line + 2)
        if ALIGNED:
            width = tl.multiple_of(width, 16)
            y_offset = tl.multiple_of(y_offset, 16)
            w_offset = tl.multiple_of(w_offset, 16)
        return number, (block - before) * BN, width, y_offset, w_offset
    else:  # noqa: RET505 - two ways to compile it
        return 0, block * BN, y_width, 0, 0


@triton.jit
def slice_field(layout_ptr, number, other, FIELD: tl.constexpr, SLICES: tl.constexpr):
    """One number of a slice's line as int32; ``other`` where there are no slices."""
    if SLICES > 1:
        return tl.load(layout_ptr + number * FIELDS + FIELD).to(tl.int32)
    else:  # noqa: RET505 - two ways to compile it
        return other
