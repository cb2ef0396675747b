"""Block sizes of the packed kernels.

What decides the order of a sum (splits, depth and width of a block, warps) follows from widths, ranks and the dtype
alone, so that a token's result does not depend on the batch around it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class RowsConfig(NamedTuple):
    """Blocks of the row kernels."""

    splits: int
    bk: int
    bn: int
    shrink_warps: int
    expand_warps: int


class DenseConfig(NamedTuple):
    """Blocks of the dense kernels; ``splits`` 0: no planes, coefficients in the shrink."""

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
    columns_first: bool


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


OVERRIDES: dict[str, tuple] = {}


def dependent_launch(x: torch.Tensor) -> bool:
    """Whether a kernel may start while its predecessor ends (programmatic dependent launch: Hopper and later)."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9


def rank_block(max_rank: int) -> int:
    """Rank rows per block of the row and tile kernels."""
    return max(16, min(64, triton.next_power_of_2(max_rank)))


def rows_config(dtype: torch.dtype, width: int, out: int, block: int, slots: int) -> RowsConfig:
    """Blocks of the row kernels."""
    if "rows" in OVERRIDES:
        return RowsConfig(*OVERRIDES["rows"])
    bk = 512 if width >= 512 else max(16, triton.next_power_of_2(width))
    splits = min(8, triton.cdiv(width, bk))
    return RowsConfig(splits, bk, 512 if out >= 512 else max(16, triton.next_power_of_2(out)), 4, 4)


def dense_config(dtype: torch.dtype, tokens: int, width: int, rows: int, *, long: bool) -> DenseConfig:
    """Blocks of the dense kernels."""
    if "dense" in OVERRIDES:
        return DenseConfig(*OVERRIDES["dense"])
    if long:
        br = max(16, min(128, triton.next_power_of_2(rows)))
        return DenseConfig(0, 64, br, 64, 4, 4, 64, br, 128, 2, 4, True)
    bm = 16 if tokens <= 16 else 32
    bk = 128 if width >= 128 else 16
    return DenseConfig(max(1, min(8, width // 512)), bm, 16, bk, 3, 4, bm, 64, 64, 2, 4, False)


def tiles_config(dtype: torch.dtype, capacity: int, tokens_per_entry: int | None) -> TilesConfig:
    """Blocks of the tile kernels; ``tokens_per_entry`` None: sorted tokens."""
    if "tiles" in OVERRIDES:
        return TilesConfig(*OVERRIDES["tiles"])
    bm = 64 if tokens_per_entry is None or tokens_per_entry > 1024 else 32 if tokens_per_entry > 64 else 16
    return TilesConfig(bm, 64 if dtype == torch.float32 else 128, 3, 4, 128, 4, True)


def wgrad_config(dtype: torch.dtype, block: int) -> WgradConfig:
    """Blocks of the gradient of a factor."""
    if "wgrad" in OVERRIDES:
        return WgradConfig(*OVERRIDES["wgrad"])
    return WgradConfig(64, block, 128, 3, 4)
