# mypy: disable-error-code="no-untyped-def"
"""Tile kernels: tokens that share an adapter stand in one tile, which reads that adapter's rank rows and no others.

A tile is a stretch of one entry's tokens (ids per example), or of tokens sorted by adapter (ids per token; one sort
per slot ``k``). Letters: ``M`` tokens, ``K`` adapters per token, ``D`` input and ``O`` output width, ``E`` adapters.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compose.kernels.packed.slices import slice_field, slice_of


@triton.jit
def _sorted_tile(tile, slot, order_ptr, tile_adapter_ptr, tile_first_ptr, tile_last_ptr, num_tokens, max_tiles,
                 BM: tl.constexpr):  # fmt: skip
    """Tokens of one tile of the list sorted by slot ``slot``: numbers, which of them exist, and their adapter."""
    number = slot * max_tiles + tile
    adapter = tl.load(tile_adapter_ptr + number)
    place = tl.load(tile_first_ptr + number) + tl.arange(0, BM)
    there = place < tl.load(tile_last_ptr + number)
    tokens = tl.load(order_ptr + slot.to(tl.int64) * num_tokens + place, mask=there, other=0)
    return tokens, there, adapter


@triton.jit
def _rank_rows(adapter, r, rank, starts_ptr, rows_ptr, RM: tl.constexpr, SLICES: tl.constexpr):
    """The rank rows behind columns ``r`` of an adapter's ``h``, of all slices, and which of them exist."""
    if SLICES > 1:
        row = tl.load(rows_ptr + adapter * RM + r, mask=r < RM, other=-1)
        return tl.where(row >= 0, row, 0), row >= 0
    else:  # noqa: RET505 - two ways to compile it
        live = r < rank
        return tl.load(starts_ptr + adapter) + tl.where(live, r, 0), live


@triton.jit(do_not_specialize=["num_tokens", "num_adapters", "tokens_per_entry", "tiles_per_entry", "max_tiles"])
def tiles_shrink_kernel(
    x_ptr, w_ptr, h_ptr, z_ptr, ids_ptr, gates_ptr, scaling_ptr, starts_ptr, ranks_ptr, rows_ptr, owner_ptr,
    order_ptr, tile_adapter_ptr, tile_first_ptr, tile_last_ptr,
    num_tokens, width, num_adapters, tokens_per_entry, tiles_per_entry, max_tiles,
    K: tl.constexpr, RM: tl.constexpr, SORTED: tl.constexpr, HAS_GATES: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
    SLICES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``h = x w_eᵀ`` and ``z = c h`` for one tile and one slot, at lines ``t K + k`` of ``RM`` columns."""
    tile = tl.program_id(0)
    slot = tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if SORTED:
        tokens, there, adapter = _sorted_tile(tile, slot, order_ptr, tile_adapter_ptr, tile_first_ptr, tile_last_ptr,
                                              num_tokens, max_tiles, BM)  # fmt: skip
    else:
        entry = tile // tiles_per_entry
        offset = (tile % tiles_per_entry) * BM + tl.arange(0, BM)
        there = offset < tokens_per_entry
        tokens = entry * tokens_per_entry + offset
        adapter = tl.load(ids_ptr + entry * K + slot)
    if (adapter >= 0) & (adapter < num_adapters):
        c = tl.zeros((BM,), tl.float32) + (1.0 if SLICES > 1 else tl.load(scaling_ptr + adapter))
        if HAS_GATES:
            gate = gates_ptr + (tokens // tokens_per_entry).to(tl.int64) * K + slot
            c = c * tl.load(gate, mask=there, other=0.0).to(tl.float32)
        rank = RM if SLICES > 1 else tl.load(ranks_ptr + adapter)
        x_row = x_ptr + tl.where(there, tokens, 0)[:, None].to(tl.int64) * width
        r = tl.arange(0, BR)
        for r0 in range(0, rank, BR):
            row, live = _rank_rows(adapter, r0 + r, rank, starts_ptr, rows_ptr, RM, SLICES)
            w_row = w_ptr + row[:, None].to(tl.int64) * width
            total = tl.zeros((BM, BR), tl.float32)
            for k0 in tl.range(0, width, BK, num_stages=STAGES):
                k = k0 + tl.arange(0, BK)
                if EVEN:
                    x = tl.load(x_row + k[None, :])
                    w = tl.load(w_row + k[None, :])
                else:
                    x = tl.load(x_row + k[None, :], mask=(k < width)[None, :], other=0.0)
                    w = tl.load(w_row + k[None, :], mask=(k < width)[None, :], other=0.0)
                total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
            place = (tokens.to(tl.int64) * K + slot)[:, None] * RM + (r0 + r)[None, :]
            mask = there[:, None] & live[None, :]
            if SAVE:
                tl.store(h_ptr + place, total.to(h_ptr.dtype.element_ty), mask=mask)
            z = total * c[:, None]
            if SLICES > 1:
                owner = tl.load(owner_ptr + row, mask=live, other=0)
                z = z * tl.load(scaling_ptr + owner, mask=live, other=0.0)[None, :]
            tl.store(z_ptr + place, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "num_adapters", "tokens_per_entry", "tiles_per_entry", "max_tiles", "slot0"]
)
def tiles_expand_kernel(
    z_ptr, w_ptr, base_ptr, y_ptr, ids_ptr, starts_ptr, ranks_ptr, layout_ptr,
    order_ptr, tile_adapter_ptr, tile_first_ptr, tile_last_ptr,
    num_tokens, y_width, num_adapters, tokens_per_entry, tiles_per_entry, max_tiles, slot0,
    K: tl.constexpr, SLOTS: tl.constexpr, RM: tl.constexpr, SORTED: tl.constexpr, HAS_BASE: tl.constexpr,
    EARLY: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, COLUMNS_FIRST: tl.constexpr,
    SLICES: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``y = base + Σ_k z_k w_e`` for one tile and ``BN`` columns: all slots of an example, or one slot when sorted.

    ``EARLY``: the kernel before does not write ``base``, so it is read while that one still runs.
    """
    if COLUMNS_FIRST:
        block = tl.program_id(0)
        tile = tl.program_id(1)
    else:
        tile = tl.program_id(0)
        block = tl.program_id(1)
    piece, n0, width, y_offset, w_offset = slice_of(block, layout_ptr, y_width, BN, SLICES, ALIGNED)
    if SLICES > 1:
        z_ptr += tl.multiple_of(slice_field(layout_ptr, piece, 0, 3, SLICES), 16)
    w_ptr += w_offset
    first_part = piece * num_adapters
    n = n0 + tl.arange(0, BN)
    inside = n < width
    entry = tile // tiles_per_entry
    if SORTED:
        tokens, there, adapter = _sorted_tile(tile, slot0, order_ptr, tile_adapter_ptr, tile_first_ptr, tile_last_ptr,
                                              num_tokens, max_tiles, BM)  # fmt: skip
    else:
        offset = (tile % tiles_per_entry) * BM + tl.arange(0, BM)
        there = offset < tokens_per_entry
        tokens = entry * tokens_per_entry + offset
    y_place = tokens[:, None].to(tl.int64) * y_width + y_offset + n[None, :]
    y_mask = there[:, None] & inside[None, :]
    if HAS_BASE and EARLY:
        y = tl.load(base_ptr + y_place, mask=y_mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if HAS_BASE and not EARLY:
        y = tl.load(base_ptr + y_place, mask=y_mask, other=0.0)
    total = tl.zeros((BM, BN), tl.float32)
    r = tl.arange(0, BR)
    for number in tl.static_range(SLOTS):
        slot = slot0 + number
        if not SORTED:
            adapter = tl.load(ids_ptr + entry * K + slot)
        known = (adapter >= 0) & (adapter < num_adapters)
        start = tl.load(starts_ptr + first_part + adapter, mask=known, other=0)
        rank = tl.load(ranks_ptr + first_part + adapter, mask=known, other=0)
        line = z_ptr + (tokens.to(tl.int64) * K + slot)[:, None] * RM
        for r0 in range(0, rank, BR):
            live = r0 + r < rank
            z = tl.load(line + (r0 + r)[None, :], mask=there[:, None] & live[None, :], other=0.0)
            w = tl.load(w_ptr + (start + r0 + r)[:, None].to(tl.int64) * width + n[None, :],
                        mask=live[:, None] & inside[None, :], other=0.0)  # fmt: skip
            total = tl.dot(z, w, total, input_precision=PRECISION)
    if HAS_BASE:
        total += y.to(tl.float32)
    tl.store(y_ptr + y_place, total.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["num_tokens", "num_adapters"])
def tiles_wgrad_kernel(
    z_ptr, x_ptr, grad_ptr, order_ptr, bounds_ptr, starts_ptr, ranks_ptr,
    num_tokens, width, num_adapters,
    K: tl.constexpr, RM: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``grad_e = Σ over the tokens of adapter e of zᵀ x``: one writer per block of rank rows and columns."""
    adapter = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    start = tl.load(starts_ptr + adapter)
    rank = tl.load(ranks_ptr + adapter)
    if tl.program_id(2) * BR < rank:
        inside = n < width
        live = r < rank
        total = tl.zeros((BR, BN), tl.float32)
        for slot in tl.static_range(K):
            bound = bounds_ptr + slot * (num_adapters + 2) + adapter + 1
            first = tl.load(bound)
            last = tl.load(bound + 1)
            for v in tl.range(first, last, BT, num_stages=STAGES):
                place = v + tl.arange(0, BT)
                there = place < last
                tokens = tl.load(order_ptr + slot * num_tokens + place, mask=there, other=0).to(tl.int64)
                z = tl.load(z_ptr + (tokens * K + slot)[:, None] * RM + r[None, :],
                            mask=there[:, None] & live[None, :], other=0.0)  # fmt: skip
                x = tl.load(x_ptr + tokens[:, None] * width + n[None, :],
                            mask=there[:, None] & inside[None, :], other=0.0)  # fmt: skip
                total = tl.dot(tl.trans(z), x, total, input_precision=PRECISION)
        place = grad_ptr + (start + r)[:, None].to(tl.int64) * width + n[None, :]
        tl.store(place, total.to(grad_ptr.dtype.element_ty), mask=live[:, None] & inside[None, :])
