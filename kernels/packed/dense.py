# mypy: disable-error-code="no-untyped-def"
"""Dense kernels: every token meets every rank row of the stack, and coefficients (0 for most, perhaps) choose.

``SLICES`` above 1: several outputs side by side, see ``slices.py``.

Letters: ``M`` tokens, ``R`` rank rows of all adapters, ``D`` input and ``O`` output width, ``C`` splits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from compose.kernels.packed.slices import slice_field, slice_of


@triton.jit
def _coefficients(
    tokens, rows, num_tokens, num_rows, ids_ptr, gates_ptr, scaling_ptr, adapter_ptr, num_adapters, tokens_per_entry,
    K: tl.constexpr, SPARSE: tl.constexpr, HAS_GATES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """``c[t, j] = gate of the adapter that owns row j, at token t, times its scaling``; float32."""
    valid = rows < num_rows
    there = tokens < num_tokens
    adapter = tl.load(adapter_ptr + rows, mask=valid, other=0)
    scaling = tl.load(scaling_ptr + adapter, mask=valid, other=0.0)
    if SLICES > 1:
        adapter = adapter % num_adapters
    entry = tokens // tokens_per_entry
    if SPARSE:
        gate = tl.zeros((tokens.shape[0], rows.shape[0]), tl.float32)
        for slot in tl.static_range(K):
            chosen = tl.load(ids_ptr + entry * K + slot, mask=there, other=-1)
            same = chosen[:, None] == adapter[None, :]
            if HAS_GATES:
                weight = tl.load(gates_ptr + entry * K + slot, mask=there, other=0.0).to(tl.float32)
                gate += tl.where(same, weight[:, None], 0.0)
            else:
                gate += tl.where(same, 1.0, 0.0)
    else:
        place = gates_ptr + entry[:, None].to(tl.int64) * num_adapters + adapter[None, :]
        gate = tl.load(place, mask=there[:, None] & valid[None, :], other=0.0).to(tl.float32)
    return gate * scaling[None, :]


@triton.jit(do_not_specialize=["num_tokens", "num_adapters", "tokens_per_entry"])
def dense_shrink_kernel(
    x_ptr, w_ptr, h_ptr, z_ptr, ids_ptr, gates_ptr, scaling_ptr, adapter_ptr,
    num_tokens, width, num_rows, num_adapters, tokens_per_entry,
    K: tl.constexpr, SPARSE: tl.constexpr, HAS_GATES: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr, PLANES: tl.constexpr, SAVE: tl.constexpr,
    EVEN: tl.constexpr, SLICES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``h = x wᵀ`` and ``z = c h``, or, with ``PLANES``, one part of ``h`` per split, in float32.

    Blocks of rows are neighbours in the grid: they run together, and one of them reads ``x`` for all.
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    there = tokens < num_tokens
    valid = rows < num_rows
    x_row = x_ptr + tl.where(there, tokens, 0)[:, None].to(tl.int64) * width
    w_row = w_ptr + tl.where(valid, rows, 0)[:, None].to(tl.int64) * width
    total = tl.zeros((BM, BR), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        k = (split * STEPS + step) * BK + tl.arange(0, BK)
        if EVEN:
            x = tl.load(x_row + k[None, :])
            w = tl.load(w_row + k[None, :])
        else:
            x = tl.load(x_row + k[None, :], mask=(k < width)[None, :], other=0.0)
            w = tl.load(w_row + k[None, :], mask=(k < width)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    mask = there[:, None] & valid[None, :]
    place = tokens[:, None].to(tl.int64) * num_rows + rows[None, :]
    if PLANES:
        plane = split.to(tl.int64) * num_tokens * num_rows
        tl.store(h_ptr + plane + place, total, mask=mask)
    else:
        if SAVE:
            tl.store(h_ptr + place, total.to(h_ptr.dtype.element_ty), mask=mask)
        c = _coefficients(tokens, rows, num_tokens, num_rows, ids_ptr, gates_ptr, scaling_ptr, adapter_ptr,
                          num_adapters, tokens_per_entry, K, SPARSE, HAS_GATES, SLICES)  # fmt: skip
        tl.store(z_ptr + place, (total * c).to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_adapters", "tokens_per_entry"])
def dense_expand_planes_kernel(
    h_ptr, saved_ptr, w_ptr, base_ptr, y_ptr, ids_ptr, gates_ptr, scaling_ptr, adapter_ptr, layout_ptr,
    num_tokens, y_width, num_rows, num_adapters, tokens_per_entry,
    K: tl.constexpr, SPARSE: tl.constexpr, HAS_GATES: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, HAS_BASE: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
    SLICES: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``y = base + (c h) w`` where ``h`` is the sum of ``C`` planes; what does not depend on ``h`` is read early."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    number, n0, width, y_offset, w_offset = slice_of(tl.program_id(1), layout_ptr, y_width, BN, SLICES, ALIGNED)
    first_row = slice_field(layout_ptr, number, 0, 5, SLICES)
    last_row = slice_field(layout_ptr, number, num_rows, 6, SLICES)
    n = n0 + tl.arange(0, BN)
    there = tokens < num_tokens
    inside = n < width
    rows = first_row + tl.arange(0, BR)
    w_place = w_ptr + w_offset + rows[:, None].to(tl.int64) * width + n[None, :]
    w = tl.load(w_place, mask=(rows < last_row)[:, None] & inside[None, :], other=0.0)
    c = _coefficients(tokens, rows, num_tokens, last_row, ids_ptr, gates_ptr, scaling_ptr, adapter_ptr,
                      num_adapters, tokens_per_entry, K, SPARSE, HAS_GATES, SLICES)  # fmt: skip
    y_place = tokens[:, None].to(tl.int64) * y_width + y_offset + n[None, :]
    y_mask = there[:, None] & inside[None, :]
    if HAS_BASE:
        y = tl.load(base_ptr + y_place, mask=y_mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BM, BN), tl.float32)
    for r0 in tl.range(0, last_row - first_row, BR, num_stages=1):
        valid = r0 + rows < last_row
        if r0 > 0:
            w = tl.load(w_place + r0 * width, mask=valid[:, None] & inside[None, :], other=0.0)
            c = _coefficients(tokens, r0 + rows, num_tokens, last_row, ids_ptr, gates_ptr, scaling_ptr, adapter_ptr,
                              num_adapters, tokens_per_entry, K, SPARSE, HAS_GATES, SLICES)  # fmt: skip
        place = tokens[:, None].to(tl.int64) * num_rows + (r0 + rows)[None, :]
        mask = there[:, None] & valid[None, :]
        if SPARSE and not SAVE:
            mask = mask & (c != 0)  # most rows are not this token's
        h = tl.zeros((BM, BR), tl.float32)
        for split in tl.static_range(C):
            h += tl.load(h_ptr + split * num_tokens.to(tl.int64) * num_rows + place, mask=mask, other=0.0)
        if SAVE:
            tl.store(saved_ptr + place, h.to(saved_ptr.dtype.element_ty), mask=mask & (n0 == 0))
        total = tl.dot((h * c).to(w.dtype), w, total, input_precision=PRECISION)
    if HAS_BASE:
        total += y.to(tl.float32)
    tl.store(y_ptr + y_place, total.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["num_tokens"])
def dense_expand_kernel(
    z_ptr, w_ptr, base_ptr, y_ptr, layout_ptr, num_tokens, y_width, num_rows,
    BM: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, HAS_BASE: tl.constexpr,
    RESIDENT: tl.constexpr, EVEN: tl.constexpr, SLICES: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``y = base + z w`` for ``BN`` columns and every ``num_programs(1)``-th tile of tokens.

    ``RESIDENT``: all rank rows fit one block, so ``w`` is read once, before ``z`` is there.
    """
    number, n0, width, y_offset, w_offset = slice_of(tl.program_id(0), layout_ptr, y_width, BN, SLICES, ALIGNED)
    first_row = slice_field(layout_ptr, number, 0, 5, SLICES)
    rows = slice_field(layout_ptr, number, num_rows, 6, SLICES) - first_row
    n = n0 + tl.arange(0, BN)
    inside = n < width
    j = tl.arange(0, BR)
    w_place = w_ptr + w_offset + (first_row + j)[:, None].to(tl.int64) * width + n[None, :]
    if RESIDENT:
        w = tl.load(w_place, mask=(j < rows)[:, None] & inside[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for t0 in tl.range(tl.program_id(1) * BM, num_tokens, tl.num_programs(1) * BM, num_stages=STAGES):
        tokens = t0 + tl.arange(0, BM)
        there = tokens < num_tokens
        z_place = z_ptr + tokens[:, None].to(tl.int64) * num_rows + (first_row + j)[None, :]
        y_place = tokens[:, None].to(tl.int64) * y_width + y_offset + n[None, :]
        mask = there[:, None] if EVEN else there[:, None] & inside[None, :]
        if RESIDENT:
            z = tl.load(z_place, mask=there[:, None] & (j < rows)[None, :], other=0.0)
            total = tl.dot(z, w, input_precision=PRECISION)
        else:
            total = tl.zeros((BM, BN), tl.float32)
            for r0 in range(0, rows, BR):
                valid = r0 + j < rows
                z = tl.load(z_place + r0, mask=there[:, None] & valid[None, :], other=0.0)
                w = tl.load(w_place + r0 * width, mask=valid[:, None] & inside[None, :], other=0.0)
                total = tl.dot(z, w, total, input_precision=PRECISION)
        if HAS_BASE:
            total += tl.load(base_ptr + y_place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + y_place, total.to(y_ptr.dtype.element_ty), mask=mask)
