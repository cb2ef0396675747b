"""Launches of the packed kernels: ``base + ((x firstᵀ) ∘ c) second``, forward and, factors swapped, backward.

Letters: ``M`` tokens, ``N`` entries of ids or gates (each rules ``M / N`` tokens), ``K`` adapters per entry, ``E``
adapters, ``R`` rank rows, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from compose.kernels.packed import interpreter, tuning
from compose.kernels.packed.dense import dense_expand_kernel, dense_shrink_kernel
from compose.kernels.packed.rows import rows_expand_kernel, rows_shrink_kernel
from compose.kernels.packed.table import TileTable
from compose.kernels.packed.tiles import tiles_expand_kernel, tiles_shrink_kernel, tiles_wgrad_kernel


interpreter.repair()


class Packed(NamedTuple):
    """What kernels read of a stack besides its two factors.

    Attributes:
        scaling_E: float32.
        adapter_R: int64: the adapter that owns each row.
        starts_E: int32: first row of each adapter.
        ranks_E: int32: live rows of each adapter.
        max_rank: Largest capacity.
    """

    scaling_E: torch.Tensor
    adapter_R: torch.Tensor
    starts_E: torch.Tensor
    ranks_E: torch.Tensor
    max_rank: int


class Route(NamedTuple):
    """Who runs through what.

    Attributes:
        shape: Launch shape: ``"rows"``, ``"dense"`` or ``"tiles"``.
        ids: ``(N, K)`` int64 contiguous, -1 for none; None: gates are dense.
        gates: ``(N, K)``, or dense ``(N, E)``, contiguous; None: 1.
        tokens_per_entry: ``M / N``.
        long: Whether tokens are many enough for large blocks; a property of one example, never of the batch.
        table: Tokens sorted by adapter, where ``tiles`` sorts.
        precision: ``"ieee"`` or ``"tf32"``: of float32 products.
    """

    shape: str
    ids: torch.Tensor | None
    gates: torch.Tensor | None
    tokens_per_entry: int
    long: bool
    table: TileTable | None
    precision: str


def low_rank(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    packed: Packed,
    route: Route,
    base: torch.Tensor | None,
    *,
    save: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``base + Σ c (x firstᵀ) second``, ``(M, O)``, and with ``save`` the products ``h = x firstᵀ``.

    Args:
        x: ``(M, D)`` contiguous.
        first: ``(R, D)`` contiguous.
        second: ``(R, O)`` contiguous.
        packed: Of the stack.
        route: Coefficients.
        base: ``(M, O)`` contiguous, or None for zeros.
        save: Whether ``h`` is wanted: ``(M K, Rmax)`` for rows and tiles, ``(M, R)`` for dense, 0 where an id is none.
        out: Written to; may be ``base``.
    """
    y = x.new_empty(x.shape[0], second.shape[1]) if out is None else out
    h = saved_like(x, packed, route) if save else x.new_empty(0)
    return _LAUNCHERS[route.shape](x, first, second, packed, route, base, y, h)


def saved_like(x: torch.Tensor, packed: Packed, route: Route) -> torch.Tensor:
    """Zeros of the shape and dtype in which ``h`` is saved."""
    if route.shape == "dense":
        return x.new_zeros(x.shape[0], packed.adapter_R.shape[0])
    pairs = x.shape[0] * slots_of(route)
    return x.new_zeros(pairs, row_capacity(packed), dtype=torch.float32 if route.shape == "rows" else x.dtype)


def slots_of(route: Route) -> int:
    """``K``; 1 for dense gates."""
    return 1 if route.ids is None else route.ids.shape[1]


def row_capacity(packed: Packed) -> int:
    """Columns of ``h`` per pair: the largest rank, in whole blocks."""
    block = tuning.rank_block(packed.max_rank)
    return triton.cdiv(packed.max_rank, block) * block


def _rows(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, packed: Packed, route: Route,
    base: torch.Tensor | None, y: torch.Tensor, h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (tokens, width), out = x.shape, second.shape[1]
    slots, num_adapters, capacity = slots_of(route), packed.scaling_E.shape[0], row_capacity(packed)
    block = tuning.rank_block(packed.max_rank)
    config = tuning.rows_config(x.dtype, width, out, block, slots)
    pairs, pdl = tokens * slots, tuning.dependent_launch(x)
    planes = x.new_empty(config.splits, pairs, capacity, dtype=torch.float32)
    steps = triton.cdiv(width, config.bk * config.splits)
    rows_shrink_kernel[(pairs, config.splits)](
        x, first, planes, route.ids, packed.starts_E, packed.ranks_E,
        width, pairs, num_adapters, route.tokens_per_entry,
        K=slots, RM=capacity, BR=block, BK=config.bk, STEPS=steps, EVEN=width == steps * config.bk * config.splits,
        PDL=pdl, num_warps=config.shrink_warps, **_launch(pdl),
    )  # fmt: skip
    rows_expand_kernel[(tokens, triton.cdiv(out, config.bn))](
        planes, h, second, base, y, route.ids, route.gates, packed.scaling_E, packed.starts_E, packed.ranks_E,
        out, pairs, num_adapters, route.tokens_per_entry, packed.max_rank,
        K=slots, KP=triton.next_power_of_2(slots), RM=capacity, BR=block, BN=config.bn, C=config.splits,
        CP=triton.next_power_of_2(config.splits), HAS_GATES=route.gates is not None, HAS_BASE=base is not None,
        SAVE=h.numel() > 0, EVEN=out % config.bn == 0, PDL=pdl, num_warps=config.expand_warps, **_launch(pdl),
    )  # fmt: skip
    return y, h


def _dense(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, packed: Packed, route: Route,
    base: torch.Tensor | None, y: torch.Tensor, h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (tokens, width), (rows, out) = x.shape, second.shape
    config = tuning.dense_config(x.dtype, tokens, width, rows, long=route.long)
    pdl, planes = tuning.dependent_launch(x), config.splits > 0
    splits = max(1, config.splits)
    z = x.new_empty(0) if planes else x.new_empty(tokens, rows)
    parts = x.new_empty(splits, tokens, rows, dtype=torch.float32) if planes else h
    steps = triton.cdiv(width, config.bk * splits)
    gating = {
        "K": slots_of(route), "SPARSE": route.ids is not None, "HAS_GATES": route.gates is not None,
        "PRECISION": route.precision, "PDL": pdl, **_launch(pdl),
    }  # fmt: skip
    coefficients = (route.ids, route.gates, packed.scaling_E, packed.adapter_R)
    sizes = (rows, packed.scaling_E.shape[0], route.tokens_per_entry)
    grid = (triton.cdiv(tokens, config.bm), triton.cdiv(rows, config.br), splits)
    dense_shrink_kernel[grid](
        x, first, parts, z, *coefficients, tokens, width, *sizes,
        BM=config.bm, BR=config.br, BK=config.bk, STEPS=steps, STAGES=config.shrink_stages, PLANES=planes,
        SAVE=h.numel() > 0, EVEN=width == steps * config.bk * splits, num_warps=config.shrink_warps, **gating,
    )  # fmt: skip
    blocks = (triton.cdiv(tokens, config.bm_out), triton.cdiv(out, config.bn))
    dense_expand_kernel[blocks[::-1] if config.columns_first else blocks](
        parts, z, h, second, base, y, *coefficients, tokens, out, *sizes,
        BM=config.bm_out, BR=config.br_out, BN=config.bn, C=config.splits, STAGES=config.expand_stages,
        HAS_BASE=base is not None, SAVE=planes and h.numel() > 0, EVEN=out % config.bn == 0,
        ONE=rows <= config.br_out, COLUMNS_FIRST=config.columns_first, num_warps=config.expand_warps, **gating,
    )  # fmt: skip
    return y, h


def _tiles(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, packed: Packed, route: Route,
    base: torch.Tensor | None, y: torch.Tensor, h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (tokens, width), out = x.shape, second.shape[1]
    slots, table = slots_of(route), route.table
    capacity, per_entry = row_capacity(packed), route.tokens_per_entry
    config = tuning.tiles_config(x.dtype, capacity, None if table else per_entry)
    bm = table.block if table else config.bm
    per_entry_tiles = triton.cdiv(per_entry, bm)
    tiles = table.max_tiles if table else tokens // per_entry * per_entry_tiles
    listed = (None,) * 4 if table is None else (table.order, table.adapter, table.first, table.last)
    pdl, block = tuning.dependent_launch(x), tuning.rank_block(packed.max_rank)
    z = x.new_empty(tokens * slots, capacity)
    sizes = (packed.scaling_E.shape[0], per_entry, per_entry_tiles, tiles)
    common = {"K": slots, "RM": capacity, "SORTED": table is not None, "BM": bm, "BR": block,
              "PRECISION": route.precision, "PDL": pdl, **_launch(pdl)}  # fmt: skip
    tiles_shrink_kernel[(tiles, slots)](
        x, first, h, z, route.ids, route.gates, packed.scaling_E, packed.starts_E, packed.ranks_E, *listed,
        tokens, width, *sizes, HAS_GATES=route.gates is not None, BK=config.bk, STAGES=config.shrink_stages,
        SAVE=h.numel() > 0, EVEN=width % config.bk == 0, num_warps=config.shrink_warps, **common,
    )  # fmt: skip
    blocks = (tiles, triton.cdiv(out, config.bn))
    for slot in range(slots if table else 1):
        tiles_expand_kernel[blocks[::-1] if config.columns_first else blocks](
            z, second, base, y, route.ids, packed.starts_E, packed.ranks_E, *listed, tokens, out, *sizes, slot,
            SLOTS=1 if table else slots, HAS_BASE=base is not None, BN=config.bn,
            COLUMNS_FIRST=config.columns_first, num_warps=config.expand_warps, **common,
        )  # fmt: skip
        base = y
    return y, h


_LAUNCHERS = {"rows": _rows, "dense": _dense, "tiles": _tiles}


def weight_gradient(
    z: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    packed: Packed,
    slots: int,
    table: TileTable,
    precision: str,
) -> torch.Tensor:
    """Return ``Σ_t z_t ⊗ x_t`` per rank row, ``(R, D)``: the gradient of a factor.

    Args:
        z: ``(M K, Rmax)``, in the dtype of ``x``.
        x: ``(M, D)``.
        weight: The factor, for its shape and dtype.
        packed: Of the stack.
        slots: ``K``.
        table: Tokens sorted by adapter.
        precision: Of float32 products.
    """
    grad = torch.zeros_like(weight)
    config = tuning.wgrad_config(x.dtype, tuning.rank_block(packed.max_rank))
    grid = (packed.scaling_E.shape[0], triton.cdiv(x.shape[1], config.bn), triton.cdiv(z.shape[1], config.br))
    tiles_wgrad_kernel[grid](
        z, x, grad, table.order, table.bounds, packed.starts_E, packed.ranks_E, x.shape[0], x.shape[1],
        packed.scaling_E.shape[0], K=slots, RM=z.shape[1], BT=config.bt, BR=config.br, BN=config.bn,
        STAGES=config.stages, PRECISION=precision, num_warps=config.warps,
    )  # fmt: skip
    return grad


def _launch(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}
