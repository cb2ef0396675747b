"""packed_lora for sliced stacks: one operator of torch for all slices, two kernels forward, slice by slice backward.

Registered as ``compose_kernels::sliced_lora``. The backward pass calls the kernels of a plain stack once per slice;
each slice after the first adds its part of ``dx`` to what the ones before it left.

Letters: ``M`` tokens, ``S`` slices, ``E`` adapters, ``R`` rank rows of all slices, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from compose.kernels.packed import gradients
from compose.kernels.packed.launch import Packed, Route, Saved, low_rank, saved_like
from compose.kernels.packed.slices import Slices
from compose.kernels.packed.table import TileTable


def sliced_lora(
    x: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    packed: Packed,
    route: Route,
    base: torch.Tensor | None,
    *,
    want_h: bool,
    want_z: bool,
) -> torch.Tensor:
    """See `compose.kernels.packed.op.packed_lora`; ``second`` is flat."""
    return _sliced_lora(x, first, second, base, *_flat(packed, route), want_h, want_z)[0]


def _flat(packed: Packed, route: Route) -> tuple[Any, ...]:
    """Packed and route as the arguments of a torch operator."""
    slices, table = packed.slices, route.table
    assert slices is not None  # noqa: S101 - this file is about slices
    index = [packed.adapter_R, packed.starts_E, packed.ranks_E, slices.layout, slices.rows_EJ]
    facts = [packed.max_rank, packed.block]
    for fact in (slices.widths, slices.rows, slices.ranks, slices.blocks):
        facts += fact
    listed = [] if table is None else list(table.tensors)
    block = 0 if table is None else table.block
    numbers = [route.tokens_per_entry, int(route.long), block]
    return packed.scaling_E, route.gates, route.ids, index, facts, route.shape, numbers, listed, route.precision


def _structured(
    scaling: torch.Tensor, gates: torch.Tensor | None, ids: torch.Tensor | None, index: list[torch.Tensor],
    facts: list[int], shape: str, numbers: list[int], table: list[torch.Tensor], precision: str,
) -> tuple[Packed, Route]:  # fmt: skip
    """The inverse of `_flat`."""
    (adapter, starts, live, layout, rows_EJ), (max_rank, block, *own) = index, facts
    count = len(own) // 4
    widths, rows, ranks, blocks = (tuple(own[place * count : (place + 1) * count]) for place in range(4))
    slices = Slices(layout, rows_EJ, widths, rows, ranks, blocks)
    listed = TileTable.of(table, numbers[2]) if table else None
    route = Route(shape, ids, gates, numbers[0], bool(numbers[1]), listed, precision)
    return Packed(scaling, adapter, starts, live, max_rank, block, slices), route


def _or_empty(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Operators of torch return tensors, not None."""
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("compose_kernels::sliced_lora", mutates_args=())
def _sliced_lora(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, base: torch.Tensor | None, scaling: torch.Tensor,
    gates: torch.Tensor | None, ids: torch.Tensor | None, index: list[torch.Tensor], facts: list[int], shape: str,
    numbers: list[int], table: list[torch.Tensor], precision: str, want_h: bool, want_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, gates, ids, index, facts, shape, numbers, table, precision)
    y, saved = low_rank(x, first, second, packed, route, base, want_h=want_h, want_z=want_z)
    return y, _or_empty(saved.h, x), _or_empty(saved.z, x)


@_sliced_lora.register_fake
def _(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, base: torch.Tensor | None, scaling: torch.Tensor,
    gates: torch.Tensor | None, ids: torch.Tensor | None, index: list[torch.Tensor], facts: list[int], shape: str,
    numbers: list[int], table: list[torch.Tensor], precision: str, want_h: bool, want_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, gates, ids, index, facts, shape, numbers, table, precision)
    assert packed.slices is not None  # noqa: S101 - this file is about slices
    saved = saved_like(x, packed, route, want_h=want_h, want_z=want_z)
    return x.new_empty(x.shape[0], sum(packed.slices.widths)), _or_empty(saved.h, x), _or_empty(saved.z, x)


@torch.library.custom_op("compose_kernels::sliced_lora_backward", mutates_args=())
def _sliced_lora_backward(
    dy: torch.Tensor, x: torch.Tensor | None, h: torch.Tensor, z: torch.Tensor, first: torch.Tensor,
    second: torch.Tensor, scaling: torch.Tensor, gates: torch.Tensor | None, ids: torch.Tensor | None,
    index: list[torch.Tensor], facts: list[int], shape: str, numbers: list[int], table: list[torch.Tensor],
    precision: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, gates, ids, index, facts, shape, numbers, table, precision)
    saved = Saved(h if h.numel() else None, z if z.numel() else None)
    return _backward_of_slices(dy, x, saved, first, second, packed, route, gradients.Wanted(*needs))


@_sliced_lora_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor | None, h: torch.Tensor, z: torch.Tensor, first: torch.Tensor,
    second: torch.Tensor, scaling: torch.Tensor, gates: torch.Tensor | None, ids: torch.Tensor | None,
    index: list[torch.Tensor], facts: list[int], shape: str, numbers: list[int], table: list[torch.Tensor],
    precision: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    like = (dy.new_empty(dy.shape[0], first.shape[1]), first, second, scaling, gates)
    return [torch.empty_like(one) if need and one is not None else dy.new_empty(0)
            for need, one in zip(needs, like, strict=True)]  # fmt: skip


def _backward_of_slices(
    dy: torch.Tensor, x: torch.Tensor | None, saved: Saved, first: torch.Tensor, second: torch.Tensor,
    packed: Packed, route: Route, wanted: gradients.Wanted,
) -> list[torch.Tensor]:  # fmt: skip
    """The five gradients of `gradients.Wanted`, empty ones where none is wanted."""
    slices = packed.slices
    assert slices is not None  # noqa: S101 - this file is about slices
    values = [rows * width for rows, width in zip(slices.rows, slices.widths, strict=True)]
    columns = slices.rows if route.shape == "dense" else slices.columns
    parts = [None if one is None else one.split(columns, 1) for one in saved]
    starts = (0, *accumulate(slices.rows))
    found: list[list[torch.Tensor]] = []
    dx = None
    for s, (dy_MO, down, up) in enumerate(
        zip(dy.split(slices.widths, 1), first.split(slices.rows), second.split(values), strict=True)
    ):
        kept = Saved(*(None if one is None else one[s].contiguous() for one in parts))
        own = _packed_slice(packed, s, starts[s])
        if slices.rows[s] == 0:
            zero = [x if x is not None else dy.new_empty(0), down, up, own.scaling_E, route.gates]
            found.append([dy.new_empty(0) if one is None else torch.zeros_like(one) for one in zero])
            continue
        up_RO = up.view(slices.rows[s], slices.widths[s])
        grads = gradients.backward(dy_MO.contiguous(), x, kept, down, up_RO, own, route, wanted, onto=dx)
        dx = grads[0] if wanted.x else None
        found.append(grads)
    if dx is None and wanted.x:
        dx = dy.new_zeros(dy.shape[0], first.shape[1])
    _, dfirst, dsecond, dscaling, dgates = zip(*found, strict=True)
    joined = (
        dx,
        torch.cat(dfirst) if wanted.first else None,
        torch.cat([one.reshape(-1) for one in dsecond]) if wanted.second else None,
        torch.stack(dscaling) if wanted.scaling else None,
        torch.stack(dgates).sum(0) if wanted.gates else None,
    )
    return [_or_empty(one, dy) for one in joined]


def _packed_slice(packed: Packed, s: int, first_row: int) -> Packed:
    """What kernels read of one slice as a stack of its own."""
    slices, num_adapters = packed.slices, packed.num_adapters
    assert slices is not None  # noqa: S101 - this file is about slices
    owner = packed.adapter_R[first_row : first_row + slices.rows[s]] - s * num_adapters
    starts = packed.starts_E[s * num_adapters : (s + 1) * num_adapters] - first_row
    return Packed(packed.scaling_E[s], owner, starts, packed.ranks_E[s], slices.ranks[s], slices.blocks[s])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, first, second, _, scaling, gates, ids, index, facts, shape, numbers, table, precision, *_ = inputs
    ctx.wanted = tuple(ctx.needs_input_grad[place] for place in (0, 1, 2, 4, 5))  # lists come after, entry by entry
    ctx.base = ctx.needs_input_grad[3]
    kept_x = x if ctx.wanted[1] else None
    ctx.save_for_backward(kept_x, *output[1:], first, second, scaling, ids, gates, *index, *table)
    ctx.plain = (facts, shape, numbers, precision, len(index))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[Any, ...]:
    x, h, z, first, second, scaling, ids, gates, *lists = ctx.saved_tensors
    facts, shape, numbers, precision, count = ctx.plain
    index, table = lists[:count], lists[count:]
    grads: list[torch.Tensor | None] = [None] * 5
    if dy is not None and any(ctx.wanted):
        found = _sliced_lora_backward(
            dy.contiguous(), x, h, z, first, second, scaling, gates, ids, index, facts, shape, numbers, table,
            precision, list(ctx.wanted),
        )  # fmt: skip
        grads = [one if need else None for one, need in zip(found, ctx.wanted, strict=True)]
    dx, dfirst, dsecond, dscaling, dgates = grads
    dbase = dy if ctx.base else None
    return (dx, dfirst, dsecond, dbase, dscaling, dgates, None, [None] * count, None, None, None,
            [None] * len(table), *(None,) * 3)  # fmt: skip


_sliced_lora.register_autograd(_backward, setup_context=_setup)
