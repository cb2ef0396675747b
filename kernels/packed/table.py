"""TileTable: tokens sorted by adapter and cut into tiles, on the device and without a host read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from compose.kernels.packed.sort import add_up_kernel, count_kernel, place_kernel
from compose.kernels.packed.start import start
from compose.kernels.packed.tuning import dependent_launch

_SORT_BLOCK = 256


@dataclass(frozen=True, eq=False)
class TileTable:
    """For each of ``K`` slots, the ``M`` tokens sorted by that slot's adapter; tokens without one come first.

    Attributes:
        order: ``(K, M)`` int32: token numbers; equal adapters in their first order.
        bounds: ``(K, E + 2)`` int32: tokens of adapter ``e`` are ``order[k, bounds[k, e + 1]:bounds[k, e + 2]]``.
        adapter: ``(K, max_tiles)`` int32: each tile's adapter, -1 for none and for unused tiles.
        first: ``(K, max_tiles)`` int32: a tile's first place in ``order``.
        last: ``(K, max_tiles)`` int32: the place after its adapter's last token.
        block: Tokens per tile.
    """

    order: torch.Tensor
    bounds: torch.Tensor
    adapter: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    block: int

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], block: int) -> TileTable:
        """The inverse of `tensors`."""
        order, bounds, adapter, first, last = tensors
        return cls(order, bounds, adapter, first, last, block)

    @property
    def max_tiles(self) -> int:
        """Tiles there is room for; depends on ``M``, ``E`` and the block alone, so a graph may be replayed."""
        return self.adapter.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The five tensors, in order."""
        return self.order, self.bounds, self.adapter, self.first, self.last


def empty_table(ids_MK: torch.Tensor, num_adapters: int, block: int) -> TileTable:
    """A table of the right sizes with nothing in it."""
    tokens, slots = ids_MK.shape
    max_tiles = -(-tokens // block) + num_adapters + 1

    def integers(width: int) -> torch.Tensor:
        return torch.empty(slots, width, dtype=torch.int32, device=ids_MK.device)

    order, bounds = integers(tokens), integers(num_adapters + 2)
    return TileTable(order, bounds, integers(max_tiles), integers(max_tiles), integers(max_tiles), block)


def tile_table(ids_MK: torch.Tensor, num_adapters: int, block: int) -> TileTable:
    """Sort tokens by adapter, slot by slot.

    Args:
        ids_MK: ``(M, K)`` int64; whatever is not in ``[0, num_adapters)`` counts as none.
        num_adapters: ``E``.
        block: Tokens per tile.
    """
    tokens, slots = ids_MK.shape
    ids_MK = ids_MK.contiguous()
    table = empty_table(ids_MK, num_adapters, block)
    blocks, groups = triton.cdiv(tokens, _SORT_BLOCK), triton.next_power_of_2(num_adapters + 2)
    counts = torch.empty(slots, blocks, groups, dtype=torch.int32, device=ids_MK.device)
    at_once = max(1, min(64, 8192 // groups))
    tile_programs = max(1, min(128, 16384 // groups))
    pdl = dependent_launch(ids_MK.device)
    common: dict[str, Any] = {"GP": groups, "PDL": pdl, "warps": 4, "pdl": pdl}
    start(count_kernel, (blocks, slots), (ids_MK, counts, tokens, num_adapters, blocks),
          K=slots, BB=_SORT_BLOCK, **common)  # fmt: skip
    start(add_up_kernel, (slots,), (counts, table.bounds, num_adapters, blocks), BP=at_once, **common)
    start(
        place_kernel, (blocks + triton.cdiv(table.max_tiles, tile_programs), slots),
        (ids_MK, counts, table.bounds, table.order, table.adapter, table.first, table.last,
         tokens, num_adapters, blocks, table.max_tiles),
        K=slots, BB=_SORT_BLOCK, BM=block, BT=tile_programs, **common,
    )  # fmt: skip
    return table
