"""Fast torch path of ``mixture_lora``: strategies for combined outputs, and the measured policy (README).

Shape letters: ``B`` batch, ``T`` tokens, ``D`` in, ``O`` out, ``E`` adapters, ``K`` chosen per entry, ``R`` rank rows,
``r`` padded rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from compose.errors import BackendUnavailableError
from compose.kernels import policy
from compose.kernels.bags import bag_lowrank, make_bags
from compose.kernels.grouped_lora.plan import plan_groups
from compose.kernels.lowrank import differentiated, lowrank
from compose.kernels.mixture_lora import parameters
from compose.kernels.mixture_lora.plan import Factors, MixturePlan, chosen_lines, keeps, prepared
from compose.kernels.routed import (
    copies_factors,
    equal_factors,
    grouped_mm_refuses,
    laid_out,
    routed_lowrank,
    sort_tokens,
)
from compose.kernels.stack import LoraStack

Strategy = Literal["none", "select", "stacked", "rows", "segments", "grouped_mm", "padded", "bag"]


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


def choose_sparse(
    stack: LoraStack, indices: torch.Tensor, tokens: int, *, training: bool, kept: bool = False
) -> Strategy:
    """The fastest strategy for gates with indices, by the measured costs of ``compose.kernels.policy``.

    Args:
        stack: Of the target.
        indices: ``(K,)``, ``(B, 1, K)`` or ``(B, T, K)``; read only on the CPU, where every token has its own.
        tokens: ``B T``.
        training: Whether backward follows.
        kept: Whether gathered factors are kept from call to call.
    """
    if indices.dim() == 1:
        return "rows" if 2 * indices.shape[0] * stack.max_rank <= stack.num_rows else "stacked"
    per_token = indices.shape[0] * indices.shape[1] == tokens and indices.device.type == "cpu"
    sortable = per_token and not kept and not torch.compiler.is_compiling()
    work = sparse_work(stack, indices, tokens, count=sortable)
    candidates = policy.allowed(work, stack, kept=kept)
    if work.adapters == 0:
        candidates = [strategy for strategy in candidates if strategy in ("stacked", "rows")]
    op: policy.Op = "grouped" if kept else "mixture"
    return policy.fastest(op, stack.a_RD.dtype, work, candidates, training=training)


def sparse_work(stack: LoraStack, indices: torch.Tensor, tokens: int, *, count: bool) -> policy.Work:
    """What the policy wants to know about indices ``(B, 1, K)`` or ``(B, T, K)``; ``count`` reads them."""
    counts = _counts(stack, indices) if count else {}
    ranks = [stack.ranks[adapter] for adapter in counts]
    lined = laid_out(tuple(counts), stack.ranks)
    copies = bool(counts) and copies_factors(stack, lined, max(ranks))
    return policy.Work(
        tokens=tokens,
        lists=indices.shape[0] * indices.shape[1],
        chosen=indices.shape[2],
        rank=stack.max_rank,
        adapters=len(counts),
        lined=len(lined),
        active_rows=stack.num_rows,
        all_rows=stack.num_rows,
        longest=max(counts.values()) if counts else 0,
        products=sum(number * stack.ranks[adapter] for adapter, number in counts.items()),
        copied_rows=len(lined) * max(ranks) if copies else 0,
        width=stack.a_RD.shape[1] + stack.b_RO.shape[1],
        itemsize=stack.a_RD.dtype.itemsize,
    )


def _counts(stack: LoraStack, indices: torch.Tensor) -> dict[int, int]:
    """How many tokens choose each adapter that has rank rows; ascending."""
    counts = torch.bincount(indices.reshape(-1) + 1, minlength=1).tolist()[1:]
    return {adapter: count for adapter, count in enumerate(counts) if count and stack.ranks[adapter]}


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
    stack, tokens = call.stack, call.x_BTD.shape[0] * call.x_BTD.shape[1]
    if strategy is None:
        operands = (call.x_BTD, call.gates, stack.a_RD, stack.b_RO, stack.scaling_E, call.base_BTO)
        kept = indices.dim() == 3 and keeps(call.plan, stack, call.gates, indices.numel() * stack.max_rank)
        strategy = choose_sparse(stack, indices, tokens, training=differentiated(*operands), kept=kept)
    if strategy == "stacked":
        return _stacked(call, scatter(call.gates, indices, stack.num_adapters))
    if strategy in ("segments", "grouped_mm", "padded", "bag"):
        return _per_token(strategy, call, indices)
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


def _per_token(strategy: Strategy, call: _Call, indices: torch.Tensor) -> torch.Tensor:
    """Strategies that handle the adapters of every token: pairs sorted by adapter, or one bag of rows per token."""
    x_BTD, stack, chosen = call.x_BTD, call.stack, indices.shape[-1]
    x_TD, base = x_BTD.flatten(0, 1), None if call.base_BTO is None else call.base_BTO.flatten(0, 1)
    scaled = call.gates * stack.scaling_E.to(call.gates.dtype)[indices.clamp(min=0)]
    c_P = scaled.reshape(-1).to(x_BTD.dtype)
    if strategy == "bag":
        return bag_lowrank(x_TD, stack, c_P, base, make_bags(stack, indices.reshape(-1, chosen))).view(
            *x_BTD.shape[:2], -1
        )
    layout = sort_tokens(plan_groups(indices.reshape(-1)), stack.ranks, chosen=chosen, padded=strategy == "padded")
    if not layout.adapters:
        return _nothing(x_BTD, stack, call.base_BTO)
    spans: tuple[tuple[int, int], ...] = ()
    if strategy == "segments":
        factors = (stack.a_RD, stack.b_RO)
        spans = tuple((stack.offsets[adapter], stack.offsets[adapter + 1]) for adapter in layout.adapters)
    else:
        if strategy == "grouped_mm" and (reason := grouped_mm_refuses(stack)):
            raise BackendUnavailableError(f"mixture_lora: grouped_mm cannot run here: {reason}; use another strategy")
        factors = equal_factors(stack, layout.adapters, aligned=strategy == "grouped_mm")
    y = routed_lowrank(x_TD, factors, layout.spread(c_P), base, layout, spans)
    return y.view(*x_BTD.shape[:2], -1)


def _nothing(x_BTD: torch.Tensor, stack: LoraStack, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """No adapter acts: a copy of base, or zeros."""
    if base_BTO is not None:
        return base_BTO.clone()
    return x_BTD.new_zeros(*x_BTD.shape[:2], stack.b_RO.shape[1])
