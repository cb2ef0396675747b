"""Block sizes of the packed kernels: from a table of measurements where one fits, else by a rule.

What decides the order of a sum (splits, depth and width of a block, warps of a reduction) follows from widths, ranks
and the dtype alone, so that a token's result does not depend on the batch around it. Configurations that hold such
numbers are looked up without the number of tokens; `DenseBlocks`, where it enters, holds none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from compose.kernels.packed import tables


class RowsConfig(NamedTuple):
    """Blocks of the row kernels: parts of the input, its columns at once, columns of the output, rank rows at once."""

    splits: int
    bk: int
    bn: int
    shrink_rows: int
    expand_rows: int
    shrink_warps: int
    expand_warps: int


class DenseSums(NamedTuple):
    """Of the dense kernels with few tokens, what decides the order of sums."""

    splits: int
    bk: int
    br_out: int


class DenseBlocks(NamedTuple):
    """Of the dense kernels with few tokens, what decides no order; ``bm`` and ``bm_out`` stay below 64.

    From 64 on the compiler takes another matrix instruction.
    """

    bm: int
    br: int
    shrink_stages: int
    shrink_warps: int
    bm_out: int
    bn: int
    expand_warps: int


class DenseConfig(NamedTuple):
    """Blocks of the dense kernels; ``programs``: about how many of the long expand share all tiles and columns."""

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
    programs: int


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


CONFIGS: Mapping[str, type] = {
    "rows": RowsConfig, "dense sums": DenseSums, "dense few": DenseBlocks, "dense many": DenseConfig,
    "tiles": TilesConfig,
}  # fmt: skip
"""What a measured table may hold, by kind."""
NUMBERS = {"rows": (2, 3), "dense sums": (0, 3), "dense few": (0, 4), "dense many": (1, 3), "tiles": (2, 3)}
"""How many numbers of an entry a shape must share, and to how many it must be near."""

_trying: dict[str, Any] = {}


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
def rows_config(
    dtype: torch.dtype, device: torch.device, width: int, out: int, block: int, max_rank: int, slots: int
) -> RowsConfig:
    """Blocks of the row kernels.

    Args:
        dtype: Of the input.
        device: Where kernels run.
        width: ``D``.
        out: ``O``, of the widest slice.
        block: `rank_block` of the stack.
        max_rank: Largest rank.
        slots: ``K``.
    """
    found = _measured("rows", dtype, device, (block, slots), (width, out, max_rank))
    if found is None:
        rows = block * (1 << (slots - 1).bit_length())
        bn = min(max(16, 8192 // rows), 512)
        found = RowsConfig(
            16 if block == 16 else 8, 256, bn, block, block, 2 if block == 16 else 4, 2 if rows == 16 else 1
        )
    bk = min(found.bk, power_of_two(width))
    return found._replace(bk=bk, splits=min(found.splits, cdiv(width, bk)), bn=min(found.bn, power_of_two(out)))


@lru_cache(maxsize=1024)
def dense_config(
    dtype: torch.dtype,
    device: torch.device,
    width: int,
    rows: int,
    out: int,
    rows_out: int,
    tokens: int,
    *,
    bare: bool = False,
) -> DenseConfig:
    """Blocks of the dense kernels.

    Args:
        dtype: Of the input.
        device: Where kernels run.
        width: ``D``.
        rows: ``R``, of all slices.
        out: ``O``, of the widest slice.
        rows_out: Rank rows of the slice that has most of them.
        tokens: 0: many. With few tokens their number decides blocks of tokens and columns only.
        bare: There is no base to read, as in a backward pass.
    """
    wide = dtype.itemsize > 2
    br, br_out, sizes = power_of_two(rows), min(128, power_of_two(rows_out)), (width, out, rows_out)
    if not tokens:
        many = _measured("dense many", dtype, device, (1,), sizes) if bare else None
        many = many or _measured("dense many", dtype, device, (0,), sizes)
        if many is None:
            bk = 32 if wide else 64
            many = DenseConfig(1, 64, 128, bk, 4, 4, 32, br_out, 64 if wide else 128, 3, 4, 384)
        bk, bn = min(many.bk, power_of_two(width)), min(many.bn, power_of_two(out))
        return many._replace(bk=bk, br=min(many.br, br), br_out=min(many.br_out, br_out), bn=bn)
    sums = _measured("dense sums", dtype, device, (), sizes) or DenseSums(4, 64 if wide else 128, br_out)
    bucket = max(16, min(512, tokens))
    blocks = _measured("dense few", dtype, device, (), (*sizes, bucket))
    if blocks is None:
        large = tokens > 64 and not wide
        blocks = DenseBlocks(16, 32, 8, 4, 32, 128, 8) if large else DenseBlocks(16, 16, 8, 4, 16, 64, 4)
    bk = min(sums.bk, power_of_two(width))
    return DenseConfig(
        min(sums.splits, cdiv(width, bk)), blocks.bm, min(blocks.br, br), bk, blocks.shrink_stages,
        blocks.shrink_warps, blocks.bm_out, min(sums.br_out, br_out), min(blocks.bn, power_of_two(out)), 1,
        blocks.expand_warps, 1,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def tiles_config(
    dtype: torch.dtype, device: torch.device, width: int, out: int, block: int, tokens_per_entry: int | None
) -> TilesConfig:
    """Blocks of the tile kernels.

    Args:
        dtype: Of the input.
        device: Where kernels run.
        width: ``D``.
        out: ``O``, of the widest slice.
        block: `rank_block` of the stack.
        tokens_per_entry: Tokens of one example; None: sorted tokens.
    """
    bk = 64 if dtype.itemsize > 2 else 128
    exact = (block, int(tokens_per_entry is None))
    found = _measured("tiles", dtype, device, exact, (width, out, tokens_per_entry or 1))
    if found is None and tokens_per_entry is None:
        found = TilesConfig(64, bk, 3, 8, 128, 8, False)
    elif found is None:
        bm = 64 if (tokens_per_entry or 1) > 1024 else 32 if (tokens_per_entry or 1) > 64 else 16
        found = TilesConfig(bm, bk, 4, 4, 128, 8 if bm == 64 else 4, False)
    return found


def wgrad_config(dtype: torch.dtype, block: int) -> WgradConfig:
    """Blocks of the gradient of a factor."""
    return WgradConfig(32 if dtype.itemsize > 2 else 64, block, 128, 3, 4)


@contextmanager
def trying(configs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, configurations of these kinds are taken as given, whatever the shape: for the tuner and for tests."""
    before = dict(_trying)
    _trying.update(configs)
    forget()
    try:
        yield
    finally:
        _trying.clear()
        _trying.update(before)
        forget()


def forget() -> None:
    """Look everything up anew: after a table was written, say."""
    tables.load.cache_clear()
    for one in (rows_config, dense_config, tiles_config):
        one.cache_clear()


def _measured(
    kind: str, dtype: torch.dtype, device: torch.device, exact: tuple[int, ...], sizes: tuple[int, ...]
) -> Any:
    """The configuration that was fastest for the nearest measured sizes, or None."""
    if kind in _trying:
        return _trying[kind]
    if device.type != "cuda":
        return None
    found = tables.nearest(tables.load(torch.cuda.get_device_name(device)), kind, dtype, exact, sizes)
    return None if found is None else CONFIGS[kind](**found)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The power of two from ``size`` on, at least 16, the smallest block of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())
