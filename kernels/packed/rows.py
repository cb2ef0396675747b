# mypy: disable-error-code="no-untyped-def"
"""Row kernels: few tokens, each with adapters of its own; plain multiply-adds, because no two tokens share a factor.

Letters: ``M`` tokens, ``K`` adapters per token, ``P = M K`` pairs, ``D`` input and ``O`` output width, ``C`` splits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compose.kernels.packed.slices import slice_field, slice_of


@triton.jit(do_not_specialize=["pairs", "num_adapters"])
def rows_shrink_kernel(
    x_ptr, w_ptr, planes_ptr, ids_ptr, starts_ptr, ranks_ptr, rows_ptr,
    width, pairs, num_adapters,
    K: tl.constexpr, RM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
    SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``planes[c, p] = w_e[:, part c] x_t[part c]``, pair ``p`` of token ``t``, adapter ``e``; dead ids: nothing.

    One program per pair, part of the input and block of rows; the last leave at once where an adapter has fewer.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = pair // K
    adapter = tl.load(ids_ptr + pair)
    if (adapter >= 0) & (adapter < num_adapters):
        if SLICES > 1:
            rank = RM
            row = tl.load(rows_ptr + adapter * RM + r, mask=r < RM, other=-1)
            live = row >= 0
        else:
            rank = tl.load(ranks_ptr + adapter)
            row = tl.load(starts_ptr + adapter) + r
            live = r < rank
        if tl.program_id(2) * BR < rank:
            total = tl.zeros((BR, BK), tl.float32)
            for step in tl.static_range(STEPS):
                k = (split * STEPS + step) * BK + tl.arange(0, BK)
                place = row[:, None].to(tl.int64) * width + k[None, :]
                if EVEN:
                    w = tl.load(w_ptr + place, mask=live[:, None], other=0.0)
                    x = tl.load(x_ptr + token.to(tl.int64) * width + k)
                else:
                    w = tl.load(w_ptr + place, mask=live[:, None] & (k < width)[None, :], other=0.0)
                    x = tl.load(x_ptr + token.to(tl.int64) * width + k, mask=k < width, other=0.0)
                total += w.to(tl.float32) * x.to(tl.float32)[None, :]
            out = planes_ptr + (split.to(tl.int64) * pairs + pair) * RM + r
            tl.store(out, tl.sum(total, axis=1), mask=r < RM)


@triton.jit
def _row_sums(planes_ptr, pairs, pair, live, r, RM: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """The planes of the rows ``(pair, r)`` added up in a fixed order."""
    c = tl.arange(0, CP)
    place = planes_ptr + (c[:, None].to(tl.int64) * pairs + pair[None, :]) * RM + r[None, :]
    return tl.sum(tl.load(place, mask=(c < C)[:, None] & live[None, :], other=0.0), axis=0)


@triton.jit(do_not_specialize=["pairs", "num_adapters", "longest"])
def rows_expand_kernel(
    planes_ptr, saved_ptr, w_ptr, base_ptr, y_ptr, ids_ptr, gates_ptr, scaling_ptr, starts_ptr, ranks_ptr, layout_ptr,
    y_width, pairs, num_adapters, longest,
    K: tl.constexpr, KP: tl.constexpr, RM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, HAS_GATES: tl.constexpr, HAS_BASE: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
    SLICES: tl.constexpr, ALIGNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``y_t = base_t + Σ_k c_tk Σ_r h_tk,r w_e[r]``, ``BN`` columns; what does not depend on ``h`` is read early."""
    token = tl.program_id(0)
    j = tl.arange(0, KP * BR)
    slot = j // BR
    pair = token * K + slot
    adapter = tl.load(ids_ptr + pair, mask=slot < K, other=-1)
    known = (adapter >= 0) & (adapter < num_adapters)
    number, n0, width, y_offset, w_offset = slice_of(tl.program_id(1), layout_ptr, y_width, BN, SLICES, ALIGNED)
    column = slice_field(layout_ptr, number, 0, 3, SLICES)
    columns = slice_field(layout_ptr, number, RM, 4, SLICES)
    part = adapter + number * num_adapters
    n = n0 + tl.arange(0, BN)
    inside = n < width
    start = tl.load(starts_ptr + part, mask=known, other=0)
    rank = tl.load(ranks_ptr + part, mask=known, other=0)
    c = tl.load(scaling_ptr + part, mask=known, other=0.0)
    if HAS_GATES:
        c = c * tl.load(gates_ptr + pair, mask=known, other=0.0).to(tl.float32)
    r = j % BR
    place = w_ptr + w_offset + (start + r)[:, None].to(tl.int64) * width + n[None, :]
    if EVEN:
        w = tl.load(place, mask=(r < rank)[:, None], other=0.0)
    else:
        w = tl.load(place, mask=(r < rank)[:, None] & inside[None, :], other=0.0)
    y_place = token.to(tl.int64) * y_width + y_offset + n
    y = tl.zeros((BN,), tl.float32)
    if HAS_BASE:
        y = tl.load(base_ptr + y_place, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    h = _row_sums(planes_ptr, pairs, pair, r < rank, column + r, RM, C, CP)
    if SAVE:
        mine = (n0 == 0) & (slot < K) & (r < columns)
        tl.store(saved_ptr + pair.to(tl.int64) * RM + column + r, h, mask=mine)
    y += tl.sum((h * c)[:, None] * w.to(tl.float32), axis=0)
    for r0 in range(BR, longest, BR):
        w = tl.load(place + r0 * width, mask=(r0 + r < rank)[:, None] & inside[None, :], other=0.0)
        h = _row_sums(planes_ptr, pairs, pair, r0 + r < rank, column + r0 + r, RM, C, CP)
        if SAVE:
            mine = (n0 == 0) & (slot < K) & (r0 + r < columns)
            tl.store(saved_ptr + pair.to(tl.int64) * RM + column + r0 + r, h, mask=mine)
        y += tl.sum((h * c)[:, None] * w.to(tl.float32), axis=0)
    tl.store(y_ptr + y_place, y.to(y_ptr.dtype.element_ty), mask=inside)
