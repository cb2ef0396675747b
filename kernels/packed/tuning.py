"""Block sizes of the packed kernels.

What decides the order of a sum (splits, depth and width of a block, warps) follows from widths, ranks and the dtype
alone, so that a token's result does not depend on the batch around it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class RowsConfig(NamedTuple):
    """Blocks of the row kernels."""

    splits: int
    bk: int
    bn: int
    shrink_warps: int
    expand_warps: int


class DenseConfig(NamedTuple):
    """Blocks of the dense kernels; ``turns``: programs that share the tiles of one block of columns."""

    splits: int
    bm: int
    br: int
    bk: int
    shrink_stages: int
    shrink_warps: int
    bm_out: int
    br_out: int
    bn: int
    expand_stages: int
    expand_warps: int
    turns: int


class TilesConfig(NamedTuple):
    """Blocks of the tile kernels."""

    bm: int
    bk: int
    shrink_stages: int
    shrink_warps: int
    bn: int
    expand_warps: int
    columns_first: bool


class WgradConfig(NamedTuple):
    """Blocks of the gradient of a factor."""

    bt: int
    br: int
    bn: int
    stages: int
    warps: int


@lru_cache(maxsize=64)
def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while its predecessor ends (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def rank_block(ranks: tuple[int, ...]) -> int:
    """Rank rows that the row and tile kernels take at once: the largest rank, or the mean where ranks are mixed."""
    live = [rank for rank in ranks if rank] or [1]
    wanted = max(live) if max(live) * len(live) <= 2 * sum(live) else -(-sum(live) // len(live))
    return min(64, power_of_two(wanted))


@lru_cache(maxsize=1024)
def rows_config(width: int, out: int, block: int, slots: int) -> RowsConfig:
    """Blocks of the row kernels."""
    bk = min(256, power_of_two(width))
    splits = min(16 if block == 16 else 8, cdiv(width, bk))
    rows = block * (1 << (slots - 1).bit_length())
    bn = min(max(16, 8192 // rows), 512, power_of_two(out))
    return RowsConfig(splits, bk, bn, 2 if block == 16 else 4, 2 if rows == 16 else 1)


@lru_cache(maxsize=1024)
def dense_config(width: int, rows: int, out: int, itemsize: int, tokens: int) -> DenseConfig:
    """Blocks of the dense kernels; ``tokens`` 0: many.

    With few tokens their number decides the blocks of tokens and columns only: the order of every sum stays the same.
    """
    br, wide = min(128, power_of_two(rows)), itemsize > 2
    if not tokens:
        bn = min(64 if wide else 128, power_of_two(out))
        bk = min(32 if wide else 64, power_of_two(width))
        return DenseConfig(1, 64, br, bk, 4, 4, 32, br, bn, 3, 4, cdiv(384, cdiv(out, bn)))
    bk = min(64 if wide else 128, power_of_two(width))
    splits = min(4, cdiv(width, bk))
    if tokens > 64 and not wide:
        return DenseConfig(splits, 16, min(32, br), bk, 8, 4, 32, br, min(128, power_of_two(out)), 1, 8, 1)
    return DenseConfig(splits, 16, 16, bk, 8, 4, 16, br, min(64, power_of_two(out)), 1, 4, 1)


@lru_cache(maxsize=1024)
def tiles_config(itemsize: int, tokens_per_entry: int | None) -> TilesConfig:
    """Blocks of the tile kernels; ``tokens_per_entry`` None: sorted tokens."""
    bk = 64 if itemsize > 2 else 128
    if tokens_per_entry is None:
        return TilesConfig(64, bk, 3, 8, 128, 8, False)
    bm = 64 if tokens_per_entry > 1024 else 32 if tokens_per_entry > 64 else 16
    return TilesConfig(bm, bk, 4, 4, 128, 8 if bm == 64 else 4, False)


def wgrad_config(block: int, itemsize: int) -> WgradConfig:
    """Blocks of the gradient of a factor."""
    return WgradConfig(32 if itemsize > 2 else 64, block, 128, 3, 4)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The power of two from ``size`` on, at least 16, the smallest block of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())
