"""TileTable: tokens sorted by adapter and cut into tiles, on the device and without a host read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from compose.kernels.packed.sort import add_up_kernel, count_kernel, place_kernel

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

    @property
    def max_tiles(self) -> int:
        """Tiles there is room for; depends on ``M``, ``E`` and the block alone, so a graph may be replayed."""
        return self.adapter.shape[1]


def tile_table(ids_MK: torch.Tensor, num_adapters: int, block: int) -> TileTable:
    """Sort tokens by adapter, slot by slot.

    Args:
        ids_MK: ``(M, K)`` int64; whatever is not in ``[0, num_adapters)`` counts as none.
        num_adapters: ``E``.
        block: Tokens per tile.
    """
    device, (tokens, slots) = ids_MK.device, ids_MK.shape
    blocks, groups = triton.cdiv(tokens, _SORT_BLOCK), triton.next_power_of_2(num_adapters + 2)
    max_tiles = triton.cdiv(tokens, block) + num_adapters + 1
    ids_MK = ids_MK.contiguous()

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    counts, bounds, order = integers(slots, blocks, groups), integers(slots, num_adapters + 2), integers(slots, tokens)
    adapter, first, last = (integers(slots, max_tiles) for _ in range(3))
    count_kernel[(blocks, slots)](ids_MK, counts, tokens, num_adapters, blocks, K=slots, BB=_SORT_BLOCK, GP=groups)
    add_up_kernel[(slots,)](counts, bounds, num_adapters, blocks, GP=groups)
    tile_programs = max(1, min(128, 16384 // groups))
    place_kernel[(blocks + triton.cdiv(max_tiles, tile_programs), slots)](
        ids_MK, counts, bounds, order, adapter, first, last, tokens, num_adapters, blocks, max_tiles,
        K=slots, BB=_SORT_BLOCK, GP=groups, BM=block, BT=tile_programs,
    )  # fmt: skip
    return TileTable(order, bounds, adapter, first, last, block)
