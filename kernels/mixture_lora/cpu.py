"""Fast torch path of ``mixture_lora``: strategies for combined outputs, and the measured policy (README).

Shape letters: ``B`` batch, ``T`` tokens, ``D`` in, ``O`` out, ``E`` adapters, ``K`` chosen per entry, ``R`` rank rows,
``r`` padded rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from compose.kernels.lowrank import lowrank
from compose.kernels.mixture_lora import parameters
from compose.kernels.mixture_lora.plan import Factors, MixturePlan, chosen_lines, prepared
from compose.kernels.policy import gather_cost, segments_cost, stacked_cost
from compose.kernels.stack import LoraStack

Strategy = Literal["none", "select", "stacked", "gather", "scatter", "pairs"]


def supports(x: torch.Tensor, stack: LoraStack) -> str | None:
    """Plain torch operators only, so it runs everything, on any device."""
    return None


class _Call(NamedTuple):
    """One call with ``x`` and ``base`` in three dimensions, and gates ``(E,)``, ``(B, 1, E)`` or ``(B, T, E)``."""

    x_BTD: torch.Tensor
    stack: LoraStack
    gates: torch.Tensor
    indices: torch.Tensor | None
    base_BTO: torch.Tensor | None
    reuse_base: bool
    plan: MixturePlan | None


def forward(
    x: torch.Tensor,
    stack: LoraStack,
    gates: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    base: torch.Tensor | None,
    combine: str,
    plan: MixturePlan | None = None,
    reuse_base: bool = False,
    strategy: Strategy | None = None,
) -> torch.Tensor:
    """See ``op.mixture_lora``; ``strategy`` overrides the policy for combined outputs."""
    flat = x.dim() == 2
    if flat:
        x, base = x.unsqueeze(1), None if base is None else base.unsqueeze(1)
    if gates.dim() == 2:
        gates, indices = gates.unsqueeze(1), None if indices is None else indices.unsqueeze(1)
    if stack.num_rows == 0 or x.numel() == 0:
        y = _nothing(x, stack, base)
    elif combine == "parameters":
        dense = gates if indices is None else scatter(gates, indices, stack.num_adapters)
        y = parameters.forward(x, stack, dense, base, reuse_base=reuse_base, plan=plan if indices is None else None)
    else:
        call = _Call(x, stack, gates, indices, base, reuse_base, plan)
        y = _dense(call, strategy) if indices is None else _sparse(call, indices, strategy)
    return y.squeeze(1) if flat else y


def scatter(gates: torch.Tensor, indices: torch.Tensor, num_adapters: int) -> torch.Tensor:
    """Sparse gates ``(…, K)`` as dense ones ``(…, E)``; repeated indices add up, -1 is dropped."""
    places = torch.where(indices < 0, num_adapters, indices)
    dense = gates.new_zeros(*gates.shape[:-1], num_adapters + 1)
    return dense.scatter_add(-1, places, gates)[..., :num_adapters]


def active_gates(stack: LoraStack, gates: torch.Tensor) -> dict[int, float] | None:
    """The gates that are not 0, by adapter, where leaving out the others is exact: one list, nothing of it trained."""
    if gates.dim() != 1 or gates.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    trained = (
        gates.requires_grad or stack.a_RD.requires_grad or stack.b_RO.requires_grad or stack.scaling_E.requires_grad
    )
    if trained and torch.is_grad_enabled():
        return None
    return {adapter: gate for adapter, gate in enumerate(gates.tolist()) if gate and stack.ranks[adapter]}


def choose_dense(stack: LoraStack, active: dict[int, float] | None) -> Strategy:
    """The measured policy for dense gates; the README has the figures."""
    if active is None:
        return "stacked"
    if len(active) <= 1:
        return "select" if active else "none"
    return "select" if 2 * sum(stack.ranks[adapter] for adapter in active) <= stack.num_rows else "stacked"


def choose_sparse(stack: LoraStack, gates: torch.Tensor, tokens: int) -> Strategy:
    """The cheapest strategy for gates with indices, by the cost model of ``compose.kernels.policy``.

    Args:
        stack: Of the target.
        gates: ``(K,)``, ``(B, 1, K)`` or ``(B, T, K)``.
        tokens: ``B T``.
    """
    chosen, width = gates.shape[-1], stack.a_RD.shape[1] + stack.b_RO.shape[1]
    if gates.dim() == 1:
        return "gather" if 2 * chosen * stack.max_rank <= stack.num_rows else "scatter"
    entries = gates.shape[0] * gates.shape[1]
    costs: dict[Strategy, float] = {
        "scatter": stacked_cost(tokens, stack.num_rows, width),
        "gather": gather_cost(entries, tokens, chosen * stack.max_rank, width, cached=False),
    }
    if entries == tokens and not torch.compiler.is_compiling():
        costs["pairs"] = segments_cost(tokens * chosen, min(stack.num_adapters, tokens * chosen), width)
    return min(costs, key=costs.__getitem__)


def _dense(call: _Call, strategy: Strategy | None) -> torch.Tensor:
    if strategy is None:
        factors = prepared(call.plan, call.stack, call.gates, 0, lambda: _dense_factors(call, None), kind="dense")
    else:
        factors = _dense_factors(call, strategy)
    if factors.a.shape[0] == 0:
        return _nothing(call.x_BTD, call.stack, call.base_BTO)
    return lowrank(call.x_BTD, *factors, call.base_BTO, reuse_base=call.reuse_base)


def _dense_factors(call: _Call, strategy: Strategy | None) -> Factors:
    """The rank rows that dense gates need: all, those of the active adapters, or none."""
    stack, gates = call.stack, call.gates
    active = active_gates(stack, gates)
    strategy = strategy or choose_dense(stack, active)
    if strategy == "stacked" or active is None:
        return Factors(stack.a_RD, stack.b_RO, stack.row_coefficients(gates).to(call.x_BTD.dtype))
    if strategy == "none":
        return Factors(stack.a_RD[:0], stack.b_RO[:0], 1.0)
    if len(active) == 1:
        ((adapter, gate),) = active.items()
        return Factors(*stack.factors(adapter), gate * stack.scaling_E[adapter].item())
    rows_R = torch.cat([torch.arange(stack.offsets[adapter], stack.offsets[adapter + 1]) for adapter in active])
    a, b = stack.a_RD.index_select(0, rows_R), stack.b_RO.index_select(0, rows_R)
    return Factors(a, b, stack.row_coefficients(gates).index_select(0, rows_R).to(call.x_BTD.dtype))


def _stacked(call: _Call, gates: torch.Tensor) -> torch.Tensor:
    """One product with all rows, dense gates as coefficients."""
    stack = call.stack
    c = stack.row_coefficients(gates).to(call.x_BTD.dtype)
    return lowrank(call.x_BTD, stack.a_RD, stack.b_RO, c, call.base_BTO, reuse_base=call.reuse_base)


def _sparse(call: _Call, indices: torch.Tensor, strategy: Strategy | None) -> torch.Tensor:
    strategy = strategy or choose_sparse(call.stack, call.gates, call.x_BTD.shape[0] * call.x_BTD.shape[1])
    if strategy == "scatter":
        return _stacked(call, scatter(call.gates, indices, call.stack.num_adapters))
    if strategy == "pairs":
        return _pairs(call, indices)
    if call.gates.dim() == 1 or call.gates.shape[1] == 1:
        return _gather(call, indices)
    batch, tokens, chosen = call.gates.shape
    flat = _Call(
        call.x_BTD.reshape(batch * tokens, 1, -1),
        call.stack,
        call.gates.reshape(batch * tokens, 1, chosen),
        None,
        None if call.base_BTO is None else call.base_BTO.reshape(batch * tokens, 1, -1),
        reuse_base=False,
        plan=None,
    )
    return _gather(flat, indices.reshape(batch * tokens, 1, chosen)).view(batch, tokens, -1)


def _gather(call: _Call, indices: torch.Tensor) -> torch.Tensor:
    """Gather the chosen adapters' rows: once for gates ``(K,)``, per batch row for ``(B, 1, K)``."""
    rows = indices.numel() * call.stack.max_rank
    factors = prepared(
        call.plan, call.stack, call.gates, rows, lambda: _gathered(call, indices), kind="gather", indices=indices
    )
    return lowrank(call.x_BTD, *factors, call.base_BTO, reuse_base=call.reuse_base)


def _gathered(call: _Call, indices: torch.Tensor) -> Factors:
    """The chosen adapters' rows; unused places repeat some row, so they are emptied and get the coefficient 0."""
    stack, lines = call.stack, chosen_lines(call.plan, call.stack, indices)
    a = stack.a_RD.index_select(0, lines.rows.reshape(-1)).view(*lines.rows.shape, stack.a_RD.shape[1])
    b = stack.b_RO.index_select(0, lines.rows.reshape(-1)).view(*lines.rows.shape, stack.b_RO.shape[1])
    scaled = call.gates * stack.scaling_E.to(call.gates.dtype)[lines.adapters]
    c = scaled[..., None].expand(*scaled.shape, stack.max_rank).flatten(-2).to(call.x_BTD.dtype)
    if lines.unused is None:
        return Factors(a, b, c)
    unused = lines.unused
    c = c.masked_fill(unused if c.dim() == 1 else unused[:, None], 0.0)
    return Factors(a.masked_fill_(unused[..., None], 0.0), b.masked_fill_(unused[..., None], 0.0), c)


def _pairs(call: _Call, indices: torch.Tensor) -> torch.Tensor:
    """Sort (token, adapter) pairs by adapter; two products per adapter; sort back and add up the pairs of a token."""
    x_BTD, stack, chosen = call.x_BTD, call.stack, call.gates.shape[-1]
    sorted_ids, order = indices.reshape(-1).sort(stable=True)
    values, counts = sorted_ids.unique_consecutive(return_counts=True)
    sorted_x = x_BTD.reshape(-1, x_BTD.shape[-1]).index_select(0, order // chosen)
    scaled = call.gates * stack.scaling_E.to(call.gates.dtype)[indices.clamp(min=0)]
    sorted_c = scaled.reshape(-1).index_select(0, order).to(x_BTD.dtype)
    parts, start = [], 0
    for adapter, count in zip(values.tolist(), counts.tolist(), strict=True):
        stop = start + count
        if adapter < 0:
            parts.append(sorted_x.new_zeros(count, stack.b_RO.shape[1]))
        else:
            c = sorted_c[None, start:stop, None]
            parts.append(lowrank(sorted_x[None, start:stop], *stack.factors(adapter), c, None)[0])
        start = stop
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    delta = torch.cat(parts).index_select(0, inverse).view(*x_BTD.shape[:2], chosen, -1).sum(2)
    return delta if call.base_BTO is None else call.base_BTO + delta


def _nothing(x_BTD: torch.Tensor, stack: LoraStack, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """No adapter acts: a copy of base, or zeros."""
    if base_BTO is not None:
        return base_BTO.clone()
    return x_BTD.new_zeros(*x_BTD.shape[:2], stack.b_RO.shape[1])
