"""packed_lora: the one differentiable operation behind the Triton backends of ``grouped_lora`` and ``mixture_lora``.

Registered with torch (``compose_kernels::packed_lora``), so ``torch.compile`` and autograd see one opaque operator with a
known result. Letters: ``M`` tokens, ``N`` entries of ids or gates, ``K`` adapters per entry, ``E`` adapters, ``R`` rank
rows, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

from typing import Any

import torch

from compose.kernels.packed import gradients
from compose.kernels.packed.launch import Packed, Route, low_rank, saved_like
from compose.kernels.packed.table import TileTable

_Operands = tuple[torch.Tensor, ...]


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
        second: ``(R, O)`` contiguous.
        packed: Of the stack.
        route: Coefficients.
        base: ``(M, O)`` contiguous, or None.
        reuse_base: Write the result over ``base`` where nothing is differentiated or traced.
    """
    tracing = torch.compiler.is_compiling()
    coefficients = (second, packed.scaling_E, route.gates)
    save = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in coefficients)
    trained = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, first, base))
    if not (tracing or save or trained):
        return low_rank(x, first, second, packed, route, base, out=base if reuse_base else None)[0]
    return _packed_lora(x, first, second, base, *_flat(packed, route), save)[0]


def _flat(packed: Packed, route: Route) -> tuple[Any, ...]:
    """Packed and route as the arguments of a torch operator."""
    table = route.table
    listed = [] if table is None else [table.order, table.bounds, table.adapter, table.first, table.last]
    block = 0 if table is None else table.block
    return (*packed, route.shape, route.ids, route.gates, route.tokens_per_entry, route.long, listed, block,
            route.precision)  # fmt: skip


def _structured(
    scaling: torch.Tensor, adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int, shape: str,
    ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str,
) -> tuple[Packed, Route]:  # fmt: skip
    """The inverse of `_flat`."""
    listed = TileTable(*table, block) if table else None
    packed = Packed(scaling, adapter, starts, ranks, max_rank)
    return packed, Route(shape, ids, gates, tokens_per_entry, long, listed, precision)


@torch.library.custom_op("compose_kernels::packed_lora", mutates_args=())
def _packed_lora(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, base: torch.Tensor | None, scaling: torch.Tensor,
    adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int, shape: str, ids: torch.Tensor | None,
    gates: torch.Tensor | None, tokens_per_entry: int, long: bool, table: list[torch.Tensor], block: int,
    precision: str, save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, adapter, starts, ranks, max_rank, shape, ids, gates, tokens_per_entry, long,
                                table, block, precision)  # fmt: skip
    return low_rank(x, first, second, packed, route, base, save=save)


@_packed_lora.register_fake
def _(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, base: torch.Tensor | None, scaling: torch.Tensor,
    adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int, shape: str, ids: torch.Tensor | None,
    gates: torch.Tensor | None, tokens_per_entry: int, long: bool, table: list[torch.Tensor], block: int,
    precision: str, save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, adapter, starts, ranks, max_rank, shape, ids, gates, tokens_per_entry, long,
                                table, block, precision)  # fmt: skip
    y = x.new_empty(x.shape[0], second.shape[1])
    return y, saved_like(x, packed, route) if save else x.new_empty(0)


@torch.library.custom_op("compose_kernels::packed_lora_backward", mutates_args=())
def _packed_lora_backward(
    dy: torch.Tensor, x: torch.Tensor | None, h: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    scaling: torch.Tensor, adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int,
    shape: str, ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    packed, route = _structured(scaling, adapter, starts, ranks, max_rank, shape, ids, gates, tokens_per_entry, long,
                                table, block, precision)  # fmt: skip
    wanted = gradients.Wanted(*needs)
    return gradients.backward(dy.contiguous(), x, h, first, second, packed, route, wanted)


@_packed_lora_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor | None, h: torch.Tensor, first: torch.Tensor, second: torch.Tensor,
    scaling: torch.Tensor, adapter: torch.Tensor, starts: torch.Tensor, ranks: torch.Tensor, max_rank: int,
    shape: str, ids: torch.Tensor | None, gates: torch.Tensor | None, tokens_per_entry: int, long: bool,
    table: list[torch.Tensor], block: int, precision: str, needs: list[bool],
) -> list[torch.Tensor]:  # fmt: skip
    wanted = gradients.Wanted(*needs)
    like = (dy.new_empty(dy.shape[0], first.shape[1]), first, second, scaling, gates)
    return [torch.empty_like(one) if need and one is not None else dy.new_empty(0)
            for need, one in zip(wanted, like, strict=True)]  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, first, second, _, scaling, adapter, starts, ranks, max_rank, shape, ids, gates, *rest = inputs
    tokens_per_entry, long, table, block, precision, _ = rest
    ctx.wanted = tuple(ctx.needs_input_grad[place] for place in (0, 1, 2, 4, 11))
    ctx.base = ctx.needs_input_grad[3]
    kept_x = x if ctx.wanted[1] else None
    ctx.save_for_backward(kept_x, output[1], first, second, scaling, adapter, starts, ranks, ids, gates, *table)
    ctx.plain = (max_rank, shape, tokens_per_entry, long, block, precision)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _: torch.Tensor | None) -> tuple[Any, ...]:
    x, h, first, second, scaling, adapter, starts, ranks, ids, gates, *table = ctx.saved_tensors
    max_rank, shape, tokens_per_entry, long, block, precision = ctx.plain
    grads: list[torch.Tensor | None] = [None] * 5
    if dy is not None and any(ctx.wanted):
        found = _packed_lora_backward(
            dy, x, h, first, second, scaling, adapter, starts, ranks, max_rank, shape, ids, gates, tokens_per_entry,
            long, table, block, precision, list(ctx.wanted),
        )  # fmt: skip
        grads = [one if need else None for one, need in zip(found, ctx.wanted, strict=True)]
    dx, dfirst, dsecond, dscaling, dgates = grads
    dbase = dy if ctx.base else None
    return (dx, dfirst, dsecond, dbase, dscaling, *(None,) * 6, dgates, None, None, [None] * len(table), *(None,) * 3)


_packed_lora.register_autograd(_backward, setup_context=_setup)
