"""packed_lora: the one differentiable operation behind the Triton backends of ``grouped_lora`` and ``mixture_lora``.

Registered with torch (``compose_kernels::packed_lora``), so ``torch.compile`` and autograd see one opaque operator
with a known result. Letters: ``M`` tokens, ``N`` entries of ids or gates, ``K`` adapters per entry, ``E`` adapters,
``R`` rank rows, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

from typing import Any

import torch

from compose.kernels.packed import gradients
from compose.kernels.packed.launch import Packed, Route, Saved, low_rank, saved_like
from compose.kernels.packed.sliced_op import sliced_lora
from compose.kernels.packed.table import TileTable, empty_table, tile_table


def packed_lora(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    packed: Packed,
    route: Route,
    base: torch.Tensor | None,
    *,
    reuse_base: bool = False,
) -> torch.Tensor:
    """Return ``base + Σ c (x firstᵀ) second``: ``(M, O)``.

    Differentiable in ``x``, both factors, the scaling, the gates and ``base``; see `launch.low_rank` for the shapes.

    Args:
        x: ``(M, D)`` contiguous.
        first: ``(R, D)`` contiguous.
        second: ``(R, O)`` contiguous, flat where there are slices.
        packed: Of the stack.
        route: Coefficients.
        base: ``(M, O)`` contiguous, or None.
        reuse_base: Write the result over ``base`` where nothing is differentiated or traced.
    """
    tracing = torch.compiler.is_compiling()
    grad = torch.is_grad_enabled()
    want_h = grad and (packed.scaling_E.requires_grad or (route.gates is not None and route.gates.requires_grad))
    want_z = grad and second.requires_grad
    trained = grad and any(one is not None and one.requires_grad for one in (x, first, base))
    if not (tracing or want_h or want_z or trained):
        return low_rank(x, first, second, packed, route, base, out=base if reuse_base else None)[0]
    if packed.slices is not None:
        return sliced_lora(x, first, second, packed, route, base, want_h=want_h, want_z=want_z)
    return _packed_lora(x, first, second, base, *_flat(packed, route), want_h, want_z)[0]


def sorted_tokens(ids_MK: torch.Tensor, num_adapters: int, block: int) -> TileTable:
    """`tile_table` as an operator of torch, so that tracing sees one node."""
    if not torch.compiler.is_compiling():
        return tile_table(ids_MK, num_adapters, block)
    return TileTable.of(_tile_table(ids_MK, num_adapters, block), block)


@torch.library.custom_op("compose_kernels::tile_table", mutates_args=())
def _tile_table(ids: torch.Tensor, num_adapters: int, block: int) -> list[torch.Tensor]:
    return list(tile_table(ids, num_adapters, block).tensors)


@_tile_table.register_fake
def _(ids: torch.Tensor, num_adapters: int, block: int) -> list[torch.Tensor]:
    return list(empty_table(ids, num_adapters, block).tensors)


def _flat(packed: Packed, route: Route) -> tuple[Any, ...]:
    """Packed and route as the arguments of a torch operator."""
    table = route.table
    listed = [] if table is None else list(table.tensors)
    block = 0 if table is None else table.block
    return (*packed[:6], route.shape, route.ids, route.gates, route.tokens_per_entry, route.long, listed, block,
            route.precision)  # fmt: skip


def _structured(
    scaling: torch.Tensor, adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int,
    row_block: int, shape: str,
    ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str,
) -> tuple[Packed, Route]:  # fmt: skip
    """The inverse of `_flat`."""
    listed = TileTable.of(table, block) if table else None
    packed = Packed(scaling, adapter, starts, ranks, max_rank, row_block)
    return packed, Route(shape, ids, gates, tokens_per_entry, long, listed, precision)


def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Operators of torch return tensors, not None."""
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("compose_kernels::packed_lora", mutates_args=())
def _packed_lora(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, base: torch.Tensor | None, scaling: torch.Tensor,
    adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int, row_block: int, shape: str,
    ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str, want_h: bool, want_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, adapter, starts, ranks, max_rank, row_block, shape, ids, gates,
                                tokens_per_entry, long, table, block, precision)  # fmt: skip
    y, saved = low_rank(x, first, second, packed, route, base, want_h=want_h, want_z=want_z)
    return y, _or_empty(saved.h, x), _or_empty(saved.z, x)


@_packed_lora.register_fake
def _(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, base: torch.Tensor | None, scaling: torch.Tensor,
    adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int, row_block: int, shape: str,
    ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str, want_h: bool, want_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, adapter, starts, ranks, max_rank, row_block, shape, ids, gates,
                                tokens_per_entry, long, table, block, precision)  # fmt: skip
    y = x.new_empty(x.shape[0], second.shape[1])
    saved = saved_like(x, packed, route, want_h=want_h, want_z=want_z)
    return y, _or_empty(saved.h, x), _or_empty(saved.z, x)


@torch.library.custom_op("compose_kernels::packed_lora_backward", mutates_args=())
def _packed_lora_backward(
    dy: torch.Tensor, x: torch.Tensor | None, h: torch.Tensor, z: torch.Tensor, first: torch.Tensor,
    second: torch.Tensor, scaling: torch.Tensor, adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor,
    max_rank: int, row_block: int, shape: str,
    ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, adapter, starts, ranks, max_rank, row_block, shape, ids, gates,
                                tokens_per_entry, long, table, block, precision)  # fmt: skip
    wanted = gradients.Wanted(*needs)
    return gradients.backward(
        dy.contiguous(),
        x,
        Saved(h if h.numel() else None, z if z.numel() else None),
        first,
        second,
        packed,
        route,
        wanted,
    )


@_packed_lora_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor | None, h: torch.Tensor, z: torch.Tensor, first: torch.Tensor,
    second: torch.Tensor, scaling: torch.Tensor, adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor,
    max_rank: int, row_block: int, shape: str,
    ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    wanted = gradients.Wanted(*needs)
    like = (dy.new_empty(dy.shape[0], first.shape[1]), first, second, scaling, gates)
    return [torch.empty_like(one) if need and one is not None else dy.new_empty(0)
            for need, one in zip(wanted, like, strict=True)]  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, first, second, _, scaling, adapter, starts, ranks, max_rank, row_block, shape, ids, gates, *rest = inputs
    tokens_per_entry, long, table, block, precision, _, _ = rest
    ctx.wanted = tuple(ctx.needs_input_grad[place] for place in (0, 1, 2, 4, 12))
    ctx.base = ctx.needs_input_grad[3]
    kept_x = x if ctx.wanted[1] else None
    ctx.save_for_backward(kept_x, *output[1:], first, second, scaling, adapter, starts, ranks, ids, gates, *table)
    ctx.plain = (max_rank, row_block, shape, tokens_per_entry, long, block, precision)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
    x, h, z, first, second, scaling, adapter, starts, ranks, ids, gates, *table = ctx.saved_tensors
    max_rank, row_block, shape, tokens_per_entry, long, block, precision = ctx.plain
    grads: list[torch.Tensor | None] = [None] * 5
    if dy is not None and any(ctx.wanted):
        found = _packed_lora_backward(
            dy, x, h, z, first, second, scaling, adapter, starts, ranks, max_rank, row_block, shape, ids, gates,
            tokens_per_entry, long, table, block, precision, list(ctx.wanted),
        )  # fmt: skip
        grads = [one if need else None for one, need in zip(found, ctx.wanted, strict=True)]
    dx, dfirst, dsecond, dscaling, dgates = grads
    dbase = dy if ctx.base else None
    return (dx, dfirst, dsecond, dbase, dscaling, *(None,) * 7, dgates, None, None, [None] * len(table), *(None,) * 4)


_packed_lora.register_autograd(_backward, setup_context=_setup)
