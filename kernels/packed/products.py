# mypy: disable-error-code="no-untyped-def"
"""Sums of products over each adapter's rank rows: the gradient of a dense gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compose.kernels.packed.start import start
from compose.kernels.packed.tuning import cdiv, power_of_two


def row_sums(
    h_MR: torch.Tensor,
    dz_MR: torch.Tensor,
    adapter_R: torch.Tensor,
    num_adapters: int,
    *,
    scaling_E: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return ``Σ over the rows of e of h dz``, times ``scaling_E`` if given: ``(M, E)``, in a fixed order."""
    (tokens, rows), padded = h_MR.shape, power_of_two(num_adapters)
    sums = h_MR.new_empty(tokens, num_adapters, dtype=dtype)
    columns = min(64, padded)
    start(
        row_sums_kernel, (cdiv(tokens, 32), cdiv(num_adapters, columns)),
        (h_MR, dz_MR, adapter_R, scaling_E, sums, tokens, rows, num_adapters),
        BM=32, BR=min(64, power_of_two(rows)), BE=columns, SCALED=scaling_E is not None, warps=4, pdl=False,
    )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["num_tokens", "num_adapters"])
def row_sums_kernel(
    h_ptr, dz_ptr, adapter_ptr, scaling_ptr, sums_ptr, num_tokens, num_rows, num_adapters,
    BM: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One block of tokens and adapters; the owner of a row is a column of ones and zeros."""
    tokens = tl.program_id(0) * BM + tl.arange(0, BM)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    there = tokens < num_tokens
    total = tl.zeros((BM, BE), tl.float32)
    for r0 in range(0, num_rows, BR):
        rows = r0 + tl.arange(0, BR)
        place = tokens[:, None].to(tl.int64) * num_rows + rows[None, :]
        mask = there[:, None] & (rows < num_rows)[None, :]
        h = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + place, mask=mask, other=0.0).to(tl.float32)
        owner = tl.load(adapter_ptr + rows, mask=rows < num_rows, other=-1)
        total = tl.dot(h * dz, (owner[:, None] == e[None, :]).to(tl.float32), total, input_precision="ieee")
    if SCALED:
        total = total * tl.load(scaling_ptr + e, mask=e < num_adapters, other=0.0)[None, :]
    out = sums_ptr + tokens[:, None].to(tl.int64) * num_adapters + e[None, :]
    tl.store(out, total.to(sums_ptr.dtype.element_ty), mask=there[:, None] & (e < num_adapters)[None, :])
