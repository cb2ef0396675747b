# mypy: disable-error-code="no-untyped-def"
"""Counting sort of tokens by adapter, slot by slot, in three small kernels: count, add up, place.

With ``PDL`` each starts while the one before it ends; only what that one writes is read after the wait.

Letters: ``M`` tokens in blocks of ``BB``, ``K`` slots, ``E`` adapters; group 0 holds tokens without an adapter, group
``e + 1`` those of adapter ``e``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _groups(ids_ptr, tokens, slot, num_tokens, num_adapters, K: tl.constexpr):
    """Group of each token; beyond the last token: group 0."""
    ids = tl.load(ids_ptr + tokens.to(tl.int64) * K + slot, mask=tokens < num_tokens, other=-1)
    return (tl.where((ids >= 0) & (ids < num_adapters), ids, -1) + 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "num_adapters", "blocks"])
def count_kernel(ids_ptr, counts_ptr, num_tokens, num_adapters, blocks, K: tl.constexpr, BB: tl.constexpr,
                 GP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """``counts[slot, block, group]``."""
    block = tl.program_id(0)
    slot = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tokens = block * BB + tl.arange(0, BB)
    groups = _groups(ids_ptr, tokens, slot, num_tokens, num_adapters, K)
    g = tl.arange(0, GP)
    beyond = tl.maximum((block + 1) * BB - num_tokens, 0)  # they were counted in group 0
    counts = tl.histogram(groups, GP) - tl.where(g == 0, beyond, 0)
    tl.store(counts_ptr + (slot * blocks + block).to(tl.int64) * GP + g, counts)


@triton.jit(do_not_specialize=["num_adapters", "blocks"])
def add_up_kernel(counts_ptr, bounds_ptr, num_adapters, blocks, GP: tl.constexpr, BP: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """Turn counts into the first place of each (block, group), and write that of each group; ``BP`` blocks at once."""
    slot = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    g = tl.arange(0, GP)
    b = tl.arange(0, BP)
    line = counts_ptr + (slot * blocks).to(tl.int64) * GP + g
    totals = tl.zeros((GP,), tl.int32)
    for block in range(0, blocks, BP):
        lines = line[None, :] + (block + b)[:, None] * GP
        totals += tl.sum(tl.load(lines, mask=(block + b < blocks)[:, None], other=0), axis=0)
    places = tl.cumsum(totals, axis=0) - totals
    tl.store(bounds_ptr + slot * (num_adapters + 2) + g, places, mask=g < num_adapters + 2)
    for block in range(0, blocks, BP):
        lines = line[None, :] + (block + b)[:, None] * GP
        counts = tl.load(lines, mask=(block + b < blocks)[:, None], other=0)
        sums = tl.cumsum(counts, axis=0)
        tl.store(lines, places[None, :] + sums - counts, mask=(block + b < blocks)[:, None])
        places += tl.sum(counts, axis=0)


@triton.jit(do_not_specialize=["num_tokens", "num_adapters", "blocks", "max_tiles"])
def place_kernel(
    ids_ptr, places_ptr, bounds_ptr, order_ptr, adapter_ptr, first_ptr, last_ptr,
    num_tokens, num_adapters, blocks, max_tiles,
    K: tl.constexpr, BB: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write each token to its place (the first ``blocks`` programs) and each tile's adapter and range (the others)."""
    number = tl.program_id(0)
    slot = tl.program_id(1)
    if number < blocks:
        local = tl.arange(0, BB)
        tokens = number * BB + local
        groups = _groups(ids_ptr, tokens, slot, num_tokens, num_adapters, K)
        earlier = (groups[:, None] == groups[None, :]) & (local[None, :] < local[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        line = places_ptr + (slot * blocks + number).to(tl.int64) * GP
        place = tl.load(line + groups) + rank
        tl.store(order_ptr + slot.to(tl.int64) * num_tokens + place, tokens, mask=tokens < num_tokens)
    else:
        tile = (number - blocks) * BT + tl.arange(0, BT)
        g = tl.arange(0, GP)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        bound = bounds_ptr + slot * (num_adapters + 2)
        low = tl.load(bound + g, mask=g < num_adapters + 1, other=0)
        high = tl.load(bound + g + 1, mask=g < num_adapters + 1, other=0)
        tiles = (high - low + BM - 1) // BM
        ended = tl.cumsum(tiles, axis=0)[None, :] <= tile[:, None]
        group = tl.sum((ended & (g < num_adapters + 1)[None, :]).to(tl.int32), axis=1)
        before = tl.sum(tl.where(ended, tiles[None, :], 0), axis=1)
        used = group < num_adapters + 1
        first = tl.load(bound + group, mask=used, other=0) + (tile - before) * BM
        last = tl.load(bound + group + 1, mask=used, other=0)
        out = slot * max_tiles + tile
        exists = tile < max_tiles
        tl.store(adapter_ptr + out, tl.where(used, group - 1, -1), mask=exists)
        tl.store(first_ptr + out, tl.where(used, first, 0), mask=exists)
        tl.store(last_ptr + out, last, mask=exists)
