"""From the public ops' operands to `packed_lora`: flat tokens, entries of ids and gates, and the launch shape."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from compose.kernels.packed import tuning
from compose.kernels.slices import SlicedStack
from compose.kernels.stack import LoraStack

if TYPE_CHECKING:
    from compose.kernels.packed.table import TileTable

MAX_RANK = 256
_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DENSE_ROWS = 256  # per adapter of a token: up to so many rank rows, masked products cost less than looking up
_FEW_TOKENS = 16  # of one example, up to which every token reads its own factors
_FEW_ROWS = 512  # of the batch, up to which they are examples where the result may depend on the batch


def supports(x: torch.Tensor, stack: LoraStack | SlicedStack) -> str | None:
    """Return why the Triton kernels cannot run these operands, or None; the interpreter counts as a device."""
    if not _INSTALLED:
        return "triton is not installed (pip install 'adapter-compose[triton]')"
    interpreted = not x.is_cuda and os.environ.get("TRITON_INTERPRET") == "1"
    if not (x.is_cuda or interpreted):
        return f"it runs on CUDA devices, not on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it computes in float16, bfloat16 or float32, not in {x.dtype}"
    if interpreted and x.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if stack.max_rank > MAX_RANK:
        return f"it takes ranks up to {MAX_RANK}, not {stack.max_rank}"
    return None


def forward(
    x: torch.Tensor,
    stack: LoraStack | SlicedStack,
    ids: torch.Tensor | None,
    gates: torch.Tensor | None,
    *,
    base: torch.Tensor | None,
    reuse_base: bool,
    precision: str,
    batch_invariant: bool,
    tables: dict[tuple[int, int], TileTable] | None = None,
) -> torch.Tensor:
    """Return ``base + Σ_k g_k s B A x`` for ``x (B, D)`` or ``(B, T, D)``.

    Args:
        x: Input.
        stack: Of the target, or of several with one input.
        ids: int64 ``(N, K)``; None: gates are dense.
        gates: ``(N, K)`` or ``(N, E)``; None: 1. ``N`` divides ``M``, the number of tokens.
        base: Added when given.
        reuse_base: The result may be written over ``base``.
        precision: ``"ieee"`` or ``"tf32"``.
        batch_invariant: An example's result has the same bits whatever batch it is in.
        tables: Sorted tokens kept between calls, by the number of adapters and tokens per tile.
    """
    from compose.kernels.packed.launch import Route, packed_of
    from compose.kernels.packed.op import packed_lora

    out = stack.out_features if isinstance(stack, SlicedStack) else stack.b_RO.shape[1]
    plain = x.dim() == 2
    flat = (x if plain else x.reshape(-1, x.shape[-1])).contiguous()
    if stack.num_rows == 0 or flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], out) if base is None else base.clone()
    base_MO = None if base is None else (base if plain else base.reshape(-1, out)).contiguous()
    reuse_base = reuse_base and base is not None and base.is_contiguous()
    entries = (ids if ids is not None else gates).shape[0]  # type: ignore[union-attr]  # one of the two is given
    per_entry = flat.shape[0] // entries
    long = (x.dim() == 3 and x.shape[1] > _FEW_TOKENS) or (not batch_invariant and x.shape[0] > _FEW_ROWS)
    shape = _shape(stack, ids, per_entry, long=long)
    packed = packed_of(stack)
    table = None
    if shape == "tiles" and per_entry == 1 and ids is not None:
        block = _tile_block(x.dtype, x.device, x.shape[-1], out, packed.block)
        table = _table(ids, stack.num_adapters, block, tables)
    ids = None if ids is None else ids.contiguous()
    gates = None if gates is None else gates.contiguous()
    route = Route(shape, ids, gates, per_entry, long, table, precision)
    second = stack.b_flat if isinstance(stack, SlicedStack) else stack.b_RO
    y = packed_lora(flat, stack.a_RD.contiguous(), second.contiguous(), packed, route, base_MO, reuse_base=reuse_base)
    return y if plain else y.view(*x.shape[:-1], out)


def _shape(stack: LoraStack | SlicedStack, ids: torch.Tensor | None, per_entry: int, *, long: bool) -> str:
    """The launch shape; see the README of this folder."""
    rows = max(map(sum, stack.ranks)) if isinstance(stack, SlicedStack) else stack.num_rows
    if ids is None or rows <= _DENSE_ROWS * ids.shape[1]:
        return "dense"
    return "tiles" if long or per_entry > 1 else "rows"


@torch.compiler.assume_constant_result
def _tile_block(dtype: torch.dtype, device: torch.device, width: int, out: int, block: int) -> int:
    """Sorted tokens per tile; a constant for the compiler, which cannot trace the look-up in tables."""
    return tuning.tiles_config(dtype, device, width, out, block, None).bm


def _table(
    ids: torch.Tensor, num_adapters: int, block: int, tables: dict[tuple[int, int], TileTable] | None
) -> TileTable:
    """Tokens sorted by adapter, from ``tables`` where they are there."""
    from compose.kernels.packed.op import sorted_tokens

    key = (num_adapters, block)
    if tables is not None and key in tables:
        return tables[key]
    table = sorted_tokens(ids, num_adapters, block)
    if tables is not None and not torch.compiler.is_compiling():
        tables[key] = table
    return table
