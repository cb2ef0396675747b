"""Launches of the packed kernels: ``base + ((x firstᵀ) ∘ c) second``, forward and, factors swapped, backward.

Letters: ``M`` tokens, ``N`` entries of ids or gates (each rules ``M / N`` tokens), ``K`` adapters per entry, ``E``
adapters, ``R`` rank rows, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from compose.kernels.packed import interpreter, tuning
from compose.kernels.packed.dense import dense_expand_kernel, dense_expand_planes_kernel, dense_shrink_kernel
from compose.kernels.packed.rows import rows_expand_kernel, rows_shrink_kernel
from compose.kernels.packed.slices import Slices, slices_of
from compose.kernels.packed.start import start
from compose.kernels.packed.table import TileTable
from compose.kernels.packed.tiles import tiles_expand_kernel, tiles_shrink_kernel, tiles_wgrad_kernel
from compose.kernels.packed.tuning import cdiv, power_of_two
from compose.kernels.slices import SlicedStack
from compose.kernels.stack import LoraStack

interpreter.repair()


class Packed(NamedTuple):
    """What kernels read of a stack besides its two factors.

    Of a sliced stack the first four are of its sub-adapters (``s E + e``; scaling and live ranks ``(S, E)``), and
    ``second`` is flat.

    Attributes:
        scaling_E: float32.
        adapter_R: int64: the adapter that owns each row.
        starts_E: int32: first row of each adapter.
        ranks_E: int32: live rows of each adapter.
        max_rank: Largest capacity.
        block: Rank rows that the row and tile kernels take at once.
        slices: Of a sliced stack.
    """

    scaling_E: torch.Tensor
    adapter_R: torch.Tensor
    starts_E: torch.Tensor
    ranks_E: torch.Tensor
    max_rank: int
    block: int
    slices: Slices | None = None

    @property
    def capacity(self) -> int:
        """Columns of ``h`` per pair of token and slot: the largest rank in whole blocks, over all slices."""
        if self.slices is not None:
            return sum(self.slices.columns)
        return cdiv(self.max_rank, self.block) * self.block

    @property
    def num_adapters(self) -> int:
        """``E``."""
        return self.scaling_E.shape[0] if self.slices is None else self.slices.rows_EJ.shape[0]

    @property
    def num_slices(self) -> int:
        """1 where there are none."""
        return 1 if self.slices is None else len(self.slices.widths)


def packed_of(stack: LoraStack | SlicedStack) -> Packed:
    """Return what kernels read of ``stack``; made once, and live as the tensors are the stack's own."""
    found: Packed | None = stack.derived.get("packed")
    if found is None:
        found = _packed_sliced(stack) if isinstance(stack, SlicedStack) else _packed(stack)
        stack.derived["packed"] = found
    return found


def _packed(stack: LoraStack) -> Packed:
    index = stack.index
    return Packed(stack.scaling_E, index.adapter_R, index.starts_E, index.ranks_E, stack.max_rank,
                  tuning.rank_block(stack.ranks))  # fmt: skip


def _packed_sliced(stack: SlicedStack) -> Packed:
    slices = slices_of(stack)
    shifts = [sum(slices.rows[:s]) for s in range(stack.num_slices)]
    owners = [one.adapter_R + s * stack.num_adapters for s, one in enumerate(stack.indices)]
    starts = [one.starts_E + shift for one, shift in zip(stack.indices, shifts, strict=True)]
    return Packed(stack.scaling_SE, torch.cat(owners), torch.cat(starts), stack.live_SE,
                  stack.max_rank, max(slices.blocks), slices)  # fmt: skip


class _Outputs(NamedTuple):
    """The columns of ``y`` as the expanding kernels see them.

    Attributes:
        widths: Of every slice; one where there are none.
        rows: Rank rows of the slice that has most of them.
        layout: See `Slices`.
    """

    widths: tuple[int, ...]
    rows: int
    layout: torch.Tensor | None

    @classmethod
    def of(cls, packed: Packed, second: torch.Tensor) -> _Outputs:
        """Of the second factor."""
        if packed.slices is None:
            return cls((second.shape[1],), second.shape[0], None)
        return cls(packed.slices.widths, max(packed.slices.rows), packed.slices.layout)

    def blocks(self, bn: int) -> int:
        """Blocks of ``bn`` columns, of which none holds two slices."""
        return _cut(self.widths, bn)[0]

    def even(self, bn: int) -> bool:
        """Whether blocks of ``bn`` columns fit."""
        return _cut(self.widths, bn)[1]

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        return {"SLICES": len(self.widths), "ALIGNED": self.even(16)}


@lru_cache(maxsize=1024)
def _cut(widths: tuple[int, ...], bn: int) -> tuple[int, bool]:
    """Blocks of ``bn`` columns, of which none holds two slices, and whether they fit."""
    return sum(cdiv(width, bn) for width in widths), all(width % bn == 0 for width in widths)


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

    @property
    def slots(self) -> int:
        """``K``; 1 for dense gates."""
        return 1 if self.ids is None else self.ids.shape[1]

    @property
    def in_planes(self) -> bool:
        """Whether ``h`` comes in parts that the second kernel adds up, so that ``c h`` never stands in memory."""
        return self.shape == "rows" or (self.shape == "dense" and not self.long)


class Saved(NamedTuple):
    """What a backward pass wants of a forward one; None where it is not wanted.

    ``(M K, Rmax)`` for rows and tiles, ``(M, R)`` for dense.

    Attributes:
        h: ``x firstᵀ``, float32; 0 where an id is none.
        z: ``c h``, in the dtype of ``x``, undefined where an id is none; where the route is `in_planes` there is ``h``
            in its place.
    """

    h: torch.Tensor | None
    z: torch.Tensor | None


def saved_like(x: torch.Tensor, packed: Packed, route: Route, *, want_h: bool, want_z: bool) -> Saved:
    """Memory for what is wanted."""
    want_h, want_z = want_h or (want_z and route.in_planes), want_z and not route.in_planes
    if not (want_h or want_z):
        return Saved(None, None)
    dense = (x.shape[0], packed.adapter_R.shape[0])
    shape = dense if route.shape == "dense" else (x.shape[0] * route.slots, packed.capacity)
    h = x.new_empty(shape, dtype=torch.float32) if want_h else None
    if h is not None and route.shape == "tiles":
        h.zero_()  # no kernel writes where an id is none, or beyond a rank
    return Saved(h, x.new_empty(shape) if want_z else None)


def low_rank(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    packed: Packed,
    route: Route,
    base: torch.Tensor | None,
    *,
    want_h: bool = False,
    want_z: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Saved]:
    """Return ``base + Σ c (x firstᵀ) second``, ``(M, O)``, and what is to be saved.

    Args:
        x: ``(M, D)`` contiguous.
        first: ``(R, D)`` contiguous.
        second: ``(R, O)`` contiguous, flat where there are slices.
        packed: Of the stack.
        route: Coefficients.
        base: ``(M, O)`` contiguous, or None for zeros.
        want_h: Whether ``h`` is wanted.
        want_z: Whether ``z`` is wanted (or ``h`` in its place, see `Saved`).
        out: Written to; may be ``base``.
    """
    outputs = _Outputs.of(packed, second)
    y = x.new_empty(x.shape[0], sum(outputs.widths)) if out is None else out
    saved = saved_like(x, packed, route, want_h=want_h, want_z=want_z)
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else nullcontext():
        _LAUNCHERS[route.shape](x, first, second, packed, route, base, y, saved, outputs)
    return y, saved


def _rows(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, packed: Packed, route: Route,
    base: torch.Tensor | None, y: torch.Tensor, saved: Saved, outputs: _Outputs,
) -> None:  # fmt: skip
    tokens, width = x.shape
    slots, num_adapters, capacity, slices = route.slots, packed.num_adapters, packed.capacity, packed.slices
    config = tuning.rows_config(x.dtype, x.device, width, max(outputs.widths), packed.block, packed.max_rank, slots)
    pairs, pdl = tokens * slots, tuning.dependent_launch(x.device)
    planes = x.new_empty(config.splits, pairs, capacity, dtype=torch.float32)
    steps = cdiv(width, config.bk * config.splits)
    start(
        rows_shrink_kernel, (pairs, config.splits, cdiv(capacity, config.shrink_rows)),
        (x, first, planes, route.ids, packed.starts_E, packed.ranks_E, None if slices is None else slices.rows_EJ,
         width, pairs, num_adapters),
        K=slots, RM=capacity, BR=config.shrink_rows, BK=config.bk, STEPS=steps,
        EVEN=width == steps * config.bk * config.splits, SLICES=packed.num_slices, PDL=pdl,
        warps=config.shrink_warps, pdl=pdl,
    )  # fmt: skip
    start(
        rows_expand_kernel, (tokens, outputs.blocks(config.bn)),
        (planes, saved.h, second, base, y, route.ids, route.gates, packed.scaling_E, packed.starts_E, packed.ranks_E,
         outputs.layout, y.shape[1], pairs, num_adapters, packed.max_rank),
        K=slots, KP=1 << (slots - 1).bit_length(), RM=capacity, BR=config.expand_rows, BN=config.bn, C=config.splits,
        CP=1 << (config.splits - 1).bit_length(), HAS_GATES=route.gates is not None, HAS_BASE=base is not None,
        SAVE=saved.h is not None, EVEN=outputs.even(config.bn), PDL=pdl, warps=config.expand_warps, pdl=pdl,
        **outputs.constants,
    )  # fmt: skip


def _dense(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, packed: Packed, route: Route,
    base: torch.Tensor | None, y: torch.Tensor, saved: Saved, outputs: _Outputs,
) -> None:  # fmt: skip
    (tokens, width), rows = x.shape, first.shape[0]
    out, few = max(outputs.widths), 0 if route.long else tokens
    config = tuning.dense_config(x.dtype, x.device, width, rows, out, outputs.rows, few, bare=base is None)
    pdl, planes, save = tuning.dependent_launch(x.device), route.in_planes, saved.h is not None
    z = saved.z if planes or saved.z is not None else x.new_empty(tokens, rows)
    parts = x.new_empty(config.splits, tokens, rows, dtype=torch.float32) if planes else saved.h
    steps = cdiv(width, config.bk * config.splits)
    common: dict[str, Any] = {"PRECISION": route.precision, "PDL": pdl, "pdl": pdl}
    gating: dict[str, Any] = {"K": route.slots, "SPARSE": route.ids is not None, "HAS_GATES": route.gates is not None}
    coefficients = (route.ids, route.gates, packed.scaling_E, packed.adapter_R)
    sizes = (rows, packed.num_adapters, route.tokens_per_entry)
    start(
        dense_shrink_kernel, (cdiv(rows, config.br), cdiv(tokens, config.bm), config.splits),
        (x, first, parts, z, *coefficients, tokens, width, *sizes),
        BM=config.bm, BR=config.br, BK=config.bk, STEPS=steps, STAGES=config.shrink_stages, PLANES=planes, SAVE=save,
        EVEN=width == steps * config.bk * config.splits, SLICES=packed.num_slices, warps=config.shrink_warps,
        **gating, **common,
    )  # fmt: skip
    common |= {"BM": config.bm_out, "BR": config.br_out, "BN": config.bn, "HAS_BASE": base is not None,
               "EVEN": outputs.even(config.bn), "warps": config.expand_warps, **outputs.constants}  # fmt: skip
    tiles, columns = cdiv(tokens, config.bm_out), outputs.blocks(config.bn)
    if planes:
        start(
            dense_expand_planes_kernel, (tiles, columns),
            (parts, saved.h, second, base, y, *coefficients, outputs.layout, tokens, y.shape[1], *sizes),
            C=config.splits, SAVE=save, **gating, **common,
        )  # fmt: skip
    else:
        start(
            dense_expand_kernel, (columns, min(tiles, cdiv(config.programs, columns))),
            (z, second, base, y, outputs.layout, tokens, y.shape[1], rows),
            STAGES=config.expand_stages, RESIDENT=outputs.rows <= config.br_out, **common,
        )  # fmt: skip


def _tiles(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, packed: Packed, route: Route,
    base: torch.Tensor | None, y: torch.Tensor, saved: Saved, outputs: _Outputs,
) -> None:  # fmt: skip
    (tokens, width), slices = x.shape, packed.slices
    slots, table, capacity, per_entry = route.slots, route.table, packed.capacity, route.tokens_per_entry
    out, stretch = max(outputs.widths), None if table else per_entry
    config = tuning.tiles_config(x.dtype, x.device, width, out, packed.block, stretch)
    bm = table.block if table else config.bm
    per_entry_tiles = cdiv(per_entry, bm)
    tiles = table.max_tiles if table else tokens // per_entry * per_entry_tiles
    listed = (None,) * 4 if table is None else (table.order, table.adapter, table.first, table.last)
    pdl = tuning.dependent_launch(x.device)
    z = x.new_empty(tokens * slots, capacity) if saved.z is None else saved.z
    sizes = (packed.num_adapters, per_entry, per_entry_tiles, tiles)
    common: dict[str, Any] = {"K": slots, "RM": capacity, "SORTED": table is not None, "BM": bm,
              "PRECISION": route.precision, "PDL": pdl, "pdl": pdl}  # fmt: skip
    start(
        tiles_shrink_kernel, (tiles, slots),
        (x, first, saved.h, z, route.ids, route.gates, packed.scaling_E, packed.starts_E, packed.ranks_E,
         *((None, None) if slices is None else (slices.rows_EJ, packed.adapter_R)), *listed, tokens, width, *sizes),
        HAS_GATES=route.gates is not None, BR=packed.block if slices is None else min(128, power_of_two(capacity)),
        BK=config.bk, STAGES=config.shrink_stages, SAVE=saved.h is not None, EVEN=width % config.bk == 0,
        SLICES=packed.num_slices, warps=config.shrink_warps, **common,
    )  # fmt: skip
    blocks = (tiles, outputs.blocks(config.bn))
    for slot in range(slots if table else 1):
        before = base if slot == 0 else y  # a token's second slot adds to what its first one left
        start(
            tiles_expand_kernel, blocks[::-1] if config.columns_first else blocks,
            (z, second, before, y, route.ids, packed.starts_E, packed.ranks_E, outputs.layout, *listed,
             tokens, y.shape[1], *sizes, slot),
            SLOTS=1 if table else slots, HAS_BASE=before is not None, EARLY=slot == 0, BR=packed.block, BN=config.bn,
            COLUMNS_FIRST=config.columns_first, warps=config.expand_warps, **outputs.constants, **common,
        )  # fmt: skip


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
    config = tuning.wgrad_config(x.dtype, packed.block)
    start(
        tiles_wgrad_kernel, (packed.scaling_E.shape[0], cdiv(x.shape[1], config.bn), cdiv(z.shape[1], config.br)),
        (z, x, grad, table.order, table.bounds, packed.starts_E, packed.ranks_E, x.shape[0], x.shape[1],
         packed.scaling_E.shape[0]),
        K=slots, RM=z.shape[1], BT=config.bt, BR=config.br, BN=config.bn, STAGES=config.stages, PRECISION=precision,
        warps=config.warps, pdl=False,
    )  # fmt: skip
    return grad
