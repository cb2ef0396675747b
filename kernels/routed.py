"""Low-rank products of tokens that were sorted by adapter: loops, ``grouped_mm`` or padded ``bmm``, one autograd.

Shape letters: ``T`` tokens, ``K`` adapters per token, ``P`` pairs of token and adapter, ``U`` distinct adapters among
them, ``Q`` lines of the sorted copy, ``D`` in, ``O`` out, ``R`` rank rows, ``r`` largest rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import grouped_mm, pad

from compose.kernels.grouped_lora.plan import GroupPlan
from compose.kernels.lines import add_pairs, sorted_forward
from compose.kernels.lowrank import differentiated
from compose.kernels.stack import LoraStack

_STRIDE_BYTES = 16
"""``grouped_mm`` wants every row to begin at a multiple of this."""


class Layout(NamedTuple):
    """Where pairs of token and adapter lie once they are sorted by adapter.

    Pairs without an adapter, or whose adapter has rank 0, share one line of zeros behind all others.

    Attributes:
        adapters: The ``U`` adapters that have rank rows and occur, or lie between those that do (``laid_out``).
        bounds: ``U + 1``: lines ``bounds[u]:bounds[u + 1]`` belong to ``adapters[u]``.
        ends_U: int32 ``bounds[1:]`` as a tensor.
        length: Lines per adapter where all have equally many (the unused ones hold some token); 0 where they differ.
        source_Q: ``(Q,)`` the token whose copy each line holds.
        place_TK: ``(T, K)`` the line of each pair.
        pair_L: ``(L,)`` the pairs that have a line of their own, sorted by adapter, and ``line_L`` these lines.
        line_L: See ``pair_L``.
        in_order: Whether line ``q`` is token ``q`` and there are no others, so nothing need be moved.
    """

    adapters: tuple[int, ...]
    bounds: tuple[int, ...]
    ends_U: torch.Tensor
    length: int
    source_Q: torch.Tensor
    place_TK: torch.Tensor
    pair_L: torch.Tensor
    line_L: torch.Tensor
    in_order: bool

    def spread(self, c_P: torch.Tensor) -> torch.Tensor:
        """Coefficients of the pairs as coefficients of the lines, ``(Q, 1)``; 0 on lines that no pair uses."""
        c_L = c_P.index_select(0, self.pair_L)
        if len(self.pair_L) == len(self.source_Q):
            return c_L[:, None]
        return c_L.new_zeros(len(self.source_Q)).index_copy(0, self.line_L, c_L)[:, None]


def sort_tokens(
    plan: GroupPlan, ranks: tuple[int, ...], *, tokens: int = 1, chosen: int = 1, padded: bool = False
) -> Layout:
    """Lay out the pairs of ``plan`` for a stack of ``ranks``.

    Args:
        plan: Of the ids: one per batch row, or of all pairs ``(T K,)`` in the order of tokens.
        ranks: Of the stack.
        tokens: Tokens per id; more than one only with ``chosen == 1``.
        chosen: ``K``.
        padded: Give every adapter as many lines as the longest has.
    """
    spans = {
        adapter: (start, stop)
        for adapter, start, stop in zip(plan.distinct, plan.bounds[:-1], plan.bounds[1:], strict=True)
        if ranks[adapter]
    }
    adapters = laid_out(tuple(spans), ranks)
    live = [spans.get(adapter, (0, 0)) for adapter in adapters]
    counts = [(stop - start) * tokens for start, stop in live]
    length = max(counts, default=0) if padded else 0
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + (length or count))
    device = plan.order.device
    pair_L = torch.cat([plan.order[start:stop] for start, stop in live] or [plan.order[:0]])
    if tokens > 1:
        pair_L = (pair_L[:, None] * tokens + torch.arange(tokens, device=device)).reshape(-1)
    line_L = torch.arange(len(pair_L), device=device)
    if padded:
        counts_U = torch.tensor(counts, dtype=torch.int64, device=device)
        first_U = torch.tensor(bounds[:-1], dtype=torch.int64, device=device) - (counts_U.cumsum(0) - counts_U)
        line_L = line_L + first_U.repeat_interleave(counts_U, output_size=len(pair_L))
    pairs = len(plan.order) * tokens
    source_Q = torch.zeros(bounds[-1] + (len(pair_L) < pairs), dtype=torch.int64, device=device)
    source_Q[line_L] = pair_L // chosen
    place_P = torch.full((pairs,), bounds[-1], dtype=torch.int64, device=device)
    place_P[pair_L] = line_L
    ends_U = torch.tensor(bounds[1:], dtype=torch.int32, device=device)
    in_order = chosen == 1 and len(source_Q) == pairs == bounds[-1]
    in_order = in_order and bool((source_Q[1:] > source_Q[:-1]).all())
    return Layout(
        adapters, tuple(bounds), ends_U, length, source_Q, place_P.view(-1, chosen), pair_L, line_L, in_order
    )


def laid_out(adapters: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The adapters that a layout has: ``adapters`` (ascending), and where that saves copying factors all between them.

    That is where ranks are equal and at most a quarter of the whole does not occur.
    """
    if not adapters:
        return adapters
    between = range(adapters[0], adapters[-1] + 1)
    if 3 * len(between) > 4 * len(adapters) or any(ranks[adapter] != ranks[adapters[0]] for adapter in between):
        return adapters
    return tuple(between)


def equal_factors(stack: LoraStack, adapters: tuple[int, ...], *, aligned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors ``(U, r, D)`` and ``(U, r, O)`` of ``adapters``: views where ranks are equal and they lie side by side.

    Elsewhere copies, filled up with rows of zeros. ``aligned``: ``r`` is rounded up to what ``grouped_mm`` wants.
    """
    rank = max(stack.ranks[adapter] for adapter in adapters)
    wanted = aligned_rank(rank, stack.a_RD.dtype) if aligned else rank
    if not copies_factors(stack, adapters, wanted):
        rows = slice(stack.offsets[adapters[0]], stack.offsets[adapters[-1] + 1])
        cells = (len(adapters), rank, -1)
        return stack.a_RD[rows].view(cells), stack.b_RO[rows].view(cells)
    lines = torch.tensor(adapters, device=stack.a_RD.device)
    rows_Ur, valid_Ur = stack.index.table_Er[lines, :rank], stack.index.valid_Er[lines, :rank]
    ragged = any(stack.ranks[adapter] != rank for adapter in adapters)

    def gather(factor: torch.Tensor) -> torch.Tensor:
        copy = factor.index_select(0, rows_Ur.reshape(-1)).unflatten(0, rows_Ur.shape)
        copy = copy.masked_fill(~valid_Ur[..., None], 0.0) if ragged else copy
        return pad(copy, (0, 0, 0, wanted - rank)) if wanted > rank else copy

    return gather(stack.a_RD), gather(stack.b_RO)


def copies_factors(stack: LoraStack, adapters: tuple[int, ...], rank: int) -> bool:
    """Whether ``equal_factors`` of this rank are copies, not views."""
    side_by_side = adapters[-1] - adapters[0] + 1 == len(adapters)
    return not side_by_side or any(stack.ranks[adapter] != rank for adapter in adapters)


def aligned_rank(rank: int, dtype: torch.dtype) -> int:
    """The next rank whose rows are aligned as ``grouped_mm`` wants them."""
    step = _STRIDE_BYTES // dtype.itemsize
    return -(-rank // step) * step


def grouped_mm_refuses(stack: LoraStack) -> str | None:
    """Why ``grouped_mm`` cannot multiply these factors; None when it can. Ranks are no reason: they are padded."""
    a, b = stack.a_RD, stack.b_RO
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{a.dtype} on {a.device.type}"
    for factor in (a, b):
        if factor.stride(1) != 1 or (factor.stride(0) * a.dtype.itemsize) % _STRIDE_BYTES:
            return f"rows of {factor.shape[1]} {a.dtype} do not begin at multiples of {_STRIDE_BYTES} bytes"
        if factor.data_ptr() % _STRIDE_BYTES:
            return f"memory does not begin at a multiple of {_STRIDE_BYTES} bytes"
    return None


def routed_lowrank(
    x_TD: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    c_Q1: torch.Tensor,
    base_TO: torch.Tensor | None,
    layout: Layout,
    spans: tuple[tuple[int, int], ...] = (),
) -> torch.Tensor:
    """Return ``base + Σ_k c_tk B A x_t`` over the pairs of every token, ``(T, O)``; differentiable in every tensor.

    Saved for backward is only what a gradient needs; ``x`` only when ``A`` is trained.

    Args:
        x_TD: Input, one line per token.
        factors: A and B, ``(U, r, D)`` and ``(U, r, O)``: multiplied by ``bmm`` where the layout is padded, else by
            ``grouped_mm``. Or ``(R, D)`` and ``(R, O)``, multiplied adapter by adapter.
        c_Q1: ``layout.spread`` of the pairs' coefficients, in the dtype of ``x``.
        base_TO: Added when given.
        layout: From ``sort_tokens``.
        spans: First row and end of each of the layout's adapters in factors ``(R, ...)``.
    """
    if differentiated(x_TD, *factors, c_Q1, base_TO):
        delta = _Routed.apply(x_TD, *factors, c_Q1, layout, spans)
        return delta if base_TO is None else base_TO + delta
    delta = sorted_forward(layout, factors, c_Q1, spans)(x_TD)
    return delta if base_TO is None else delta.add_(base_TO)


class _Routed(torch.autograd.Function):
    """Autograd of ``routed_lowrank``; both directions gather lines, multiply twice and add the lines of each token."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        layout: Layout,
        spans: tuple[tuple[int, int], ...],
    ) -> torch.Tensor:
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[:4]
        h = _shrink(x.index_select(0, layout.source_Q), a, layout, spans)
        z = h * c if need_b or need_c else h.mul_(c)
        ctx.save_for_backward(
            x if need_a else None,
            a if need_x or need_a else None,
            b if need_x or need_a or need_b or need_c else None,
            c if need_x or need_a or need_b else None,
            h if need_b or need_c else None,
        )
        ctx.layout, ctx.spans = layout, spans
        return add_pairs(_expand(z, b, layout, spans), layout.place_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[:4]
        x, a, b, c, h = ctx.saved_tensors
        layout, spans = ctx.layout, ctx.spans
        dx = da = db = dc = None
        dy_QO = dy.index_select(0, layout.source_Q)  # fresh memory: an expanded gradient has strides nothing accepts
        if need_b:
            db = _outer(h * c, dy_QO, b, layout, spans)
        if need_x or need_a or need_c:
            dz = _shrink(dy_QO, b, layout, spans)
            if need_c:
                dc = (h * dz).sum(1, keepdim=True)
            if need_x or need_a:
                dh = dz.mul_(c)
                da = _outer(dh, x.index_select(0, layout.source_Q), a, layout, spans) if need_a else None
                dx = add_pairs(_expand(dh, a, layout, spans), layout.place_TK) if need_x else None
        return dx, da, db, dc, None, None


def _shrink(
    x_QD: torch.Tensor, factor: torch.Tensor, layout: Layout, spans: tuple[tuple[int, int], ...]
) -> torch.Tensor:
    """``x fᵀ`` of every line with its adapter's factor, ``(Q, r)``; zeros on the line without an adapter."""
    live = layout.bounds[-1]
    if factor.dim() == 2:
        ranks = [stop - start for start, stop in spans]
        h = x_QD.new_zeros(len(x_QD), max(ranks)) if min(ranks) < max(ranks) else x_QD.new_empty(len(x_QD), ranks[0])
        for (first, end), (start, stop) in zip(_segments(layout), spans, strict=True):
            torch.mm(x_QD[first:end], factor[start:stop].t(), out=h[first:end, : stop - start])
    elif layout.length:
        h = x_QD.new_empty(len(x_QD), factor.shape[1])
        cells = (len(factor), layout.length, -1)
        torch.bmm(x_QD[:live].view(cells), factor.transpose(1, 2), out=h[:live].view(cells))
    else:
        h = grouped_mm(x_QD, factor.transpose(1, 2), offs=layout.ends_U)
    if live < len(h):
        h[live:] = 0.0
    return h


def _expand(
    z_Qr: torch.Tensor, factor: torch.Tensor, layout: Layout, spans: tuple[tuple[int, int], ...]
) -> torch.Tensor:
    """``z f`` of every line with its adapter's factor, ``(Q, O)``; zeros on the line without an adapter."""
    live = layout.bounds[-1]
    if factor.dim() == 2:
        y = z_Qr.new_empty(len(z_Qr), factor.shape[1])
        for (first, end), (start, stop) in zip(_segments(layout), spans, strict=True):
            torch.mm(z_Qr[first:end, : stop - start], factor[start:stop], out=y[first:end])
    elif layout.length:
        y = z_Qr.new_empty(len(z_Qr), factor.shape[2])
        cells = (len(factor), layout.length, -1)
        torch.bmm(z_Qr[:live].view(cells), factor, out=y[:live].view(cells))
    else:
        y = grouped_mm(z_Qr, factor, offs=layout.ends_U)
    if live < len(y):
        y[live:] = 0.0
    return y


def _outer(
    z_Qr: torch.Tensor,
    x_QD: torch.Tensor,
    factor: torch.Tensor,
    layout: Layout,
    spans: tuple[tuple[int, int], ...],
) -> torch.Tensor:
    """``zᵀ x`` over the lines of each adapter, in the shape of ``factor``; unused lines have ``z = 0``."""
    live = layout.bounds[-1]
    if factor.dim() == 2:
        gradient = torch.zeros_like(factor)
        for (first, end), (start, stop) in zip(_segments(layout), spans, strict=True):
            torch.mm(z_Qr[first:end, : stop - start].t(), x_QD[first:end], out=gradient[start:stop])
        return gradient
    if layout.length:
        lines_z, lines_x = (t[:live].view(len(factor), layout.length, -1) for t in (z_Qr, x_QD))
        return torch.bmm(lines_z.transpose(1, 2), lines_x)
    return grouped_mm(z_Qr.t(), x_QD, offs=layout.ends_U)


def _segments(layout: Layout) -> Iterator[tuple[int, int]]:
    return zip(layout.bounds[:-1], layout.bounds[1:], strict=True)
