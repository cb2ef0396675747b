"""Fast torch path of ``grouped_lora``: its strategies, and the measured policy that picks one (README).

Shape letters: ``B`` batch, ``T`` tokens, ``N`` entries of ids, ``D`` in, ``O`` out, ``R`` rank rows, ``r`` padded
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch

from compose.errors import BackendUnavailableError
from compose.kernels import policy
from compose.kernels.bags import Bags, bag_forward, bag_lowrank, make_bags
from compose.kernels.grouped_lora.plan import GroupPlan
from compose.kernels.lines import Spans, sorted_forward
from compose.kernels.lowrank import differentiated, lowrank, undifferentiated
from compose.kernels.routed import (
    Layout,
    copies_factors,
    equal_factors,
    grouped_mm_refuses,
    laid_out,
    routed_lowrank,
    sort_tokens,
)
from compose.kernels.stack import LoraStack

Strategy = Literal["none", "single", "rows", "stacked", "segments", "grouped_mm", "padded", "bag"]


def supports(x: torch.Tensor, stack: LoraStack) -> str | None:
    """Plain torch operators only, so it runs everything, on any device."""
    return None


def forward(
    x: torch.Tensor,
    stack: LoraStack,
    ids: torch.Tensor,
    *,
    base: torch.Tensor | None,
    plan: GroupPlan | None,
    reuse_base: bool = False,
    strategy: Strategy | None = None,
) -> torch.Tensor:
    """See ``op.grouped_lora``; ``strategy`` overrides the policy. While tracing nothing is read on the host."""
    traced = plan is None or torch.compiler.is_compiling()
    if stack.num_rows == 0 or x.numel() == 0:
        return base.clone() if base is not None else x.new_zeros(*x.shape[:-1], stack.b_RO.shape[1])
    if plan is not None and not traced and not differentiated(x, stack.a_RD, stack.b_RO, stack.scaling_E, base):
        return _undifferentiated(x, stack, plan, base, reuse_base, strategy)
    flat = x.dim() == 2
    x_BTD, base_BTO = (x.unsqueeze(1), None if base is None else base.unsqueeze(1)) if flat else (x, base)
    if plan is None or traced:
        y = _traced(x_BTD, stack, ids, base_BTO)
    else:
        prepared = _prepared(stack, plan)
        strategy = strategy or _choice(stack, plan, prepared, x_BTD.shape[0] * x_BTD.shape[1])
        y = _run(strategy, x_BTD, stack, plan, prepared, base_BTO)
    return y.squeeze(1) if flat else y


def choose(stack: LoraStack, plan: GroupPlan, tokens: int, *, training: bool) -> Strategy:
    """The fastest strategy by the measured costs of ``compose.kernels.policy``.

    Args:
        stack: Of the target.
        plan: Of the ids.
        tokens: ``B T``.
        training: Whether backward follows.
    """
    work = work_of(stack, plan, tokens)
    if work.adapters == 0:
        return "none"
    if plan.single is not None:
        return "single"
    return policy.fastest("grouped", stack.a_RD.dtype, work, policy.allowed(work, stack, kept=True), training=training)


def work_of(stack: LoraStack, plan: GroupPlan, tokens: int) -> policy.Work:
    """What the policy wants to know about ids and a stack."""
    spans = zip(plan.distinct, plan.bounds[:-1], plan.bounds[1:], strict=True)
    counts = {adapter: stop - start for adapter, start, stop in spans if stack.ranks[adapter]}
    ranks, per_entry = [stack.ranks[adapter] for adapter in counts], tokens // len(plan.order)
    lined = laid_out(tuple(counts), stack.ranks)
    copies = bool(counts) and copies_factors(stack, lined, max(ranks))
    return policy.Work(
        tokens=tokens,
        lists=len(plan.order),
        chosen=1,
        rank=max(ranks, default=0),
        adapters=len(counts),
        lined=len(lined),
        active_rows=sum(ranks),
        all_rows=stack.num_rows,
        longest=max(counts.values(), default=0) * per_entry,
        products=sum(count * stack.ranks[adapter] for adapter, count in counts.items()) * per_entry,
        copied_rows=len(lined) * max(ranks) if copies else 0,
        width=stack.a_RD.shape[1] + stack.b_RO.shape[1],
        itemsize=stack.a_RD.dtype.itemsize,
    )


_Forward = Callable[[torch.Tensor, torch.Tensor | None, bool], torch.Tensor]
"""``x (T, D)``, ``base (T, O)`` or None, and whether base may be written over: the result ``(T, O)``."""


class _Factors(NamedTuple):
    """Operands of ``lowrank``."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor | float


@dataclass
class _Prepared:
    """What is kept per plan and stack.

    Attributes:
        versions: Of the stack when the factors were gathered; None: nothing may be kept.
        factors: Gathered factors by strategy.
        choices: The policy's choice for training, by number of tokens.
        forwards: What is left to do without gradients, by number of tokens and strategy; None: the policy's.
    """

    versions: tuple[int, int, int] | None
    factors: dict[str, _Factors] = field(default_factory=dict)
    choices: dict[int, Strategy] = field(default_factory=dict)
    forwards: dict[tuple[int, Strategy | None], _Forward] = field(default_factory=dict)


def _prepared(stack: LoraStack, plan: GroupPlan) -> _Prepared:
    """Look up or start the record of ``stack``; what was gathered is dropped when a factor has been written to since.

    Where the stack has no versions to compare, every call gathers anew.
    """
    versions = stack.versions()
    found = plan.gathered.get(stack)
    if found is None or versions is None or found.versions != versions:
        found = plan.gathered[stack] = _Prepared(versions, choices={} if found is None else found.choices)
    return found


def _choice(stack: LoraStack, plan: GroupPlan, prepared: _Prepared, tokens: int) -> Strategy:
    """``choose`` for training, remembered."""
    if tokens not in prepared.choices:
        prepared.choices[tokens] = choose(stack, plan, tokens, training=True)
    return prepared.choices[tokens]


def _factors_of(strategy: Strategy, stack: LoraStack, plan: GroupPlan, prepared: _Prepared) -> _Factors:
    """The operands of a strategy, kept where that is possible."""
    factors = prepared.factors.get(strategy)
    if factors is None:
        factors = _GATHER[strategy](stack, plan)
        if prepared.versions is not None:
            prepared.factors[strategy] = factors
    return factors


def _undifferentiated(
    x: torch.Tensor,
    stack: LoraStack,
    plan: GroupPlan,
    base: torch.Tensor | None,
    reuse_base: bool,
    strategy: Strategy | None,
) -> torch.Tensor:
    """Whatever does not depend on ``x`` is done in the first call of a plan, stack and number of tokens."""
    x_TD = x if x.dim() == 2 else x.flatten(0, 1)
    base_TO = base if base is None or base.dim() == 2 else base.flatten(0, 1)
    prepared = _prepared(stack, plan)
    tokens = x_TD.shape[0]
    run = prepared.forwards.get((tokens, strategy))
    if run is None:
        with torch.inference_mode(False):
            chosen = strategy or choose(stack, plan, tokens, training=False)
            run = _forward(chosen, stack, plan, prepared, tokens)
        if prepared.versions is not None:
            prepared.forwards[tokens, strategy] = run
    y = run(x_TD, base_TO, reuse_base)
    return y if x.dim() == 2 else y.view(*x.shape[:2], -1)


def _forward(strategy: Strategy, stack: LoraStack, plan: GroupPlan, prepared: _Prepared, tokens: int) -> _Forward:
    """What a strategy does with ``x (T, D)`` and ``base (T, O)``."""
    if strategy == "none":
        out = stack.b_RO.shape[1]
        return lambda x, base, reuse: x.new_zeros(len(x), out) if base is None else base.clone()
    if strategy == "bag":
        bags, c_T = _bags(stack, plan, tokens)
        a, b, c_N = stack.a_RD, stack.b_RO, c_T.index_select(0, bags.pairs_N)
        return lambda x, base, reuse: bag_forward(x, a, b, c_N, base, bags)
    factors = _factors_of(strategy, stack, plan, prepared)
    if strategy in ("segments", "grouped_mm", "padded"):
        layout, c_Q1, spans = _sorted(strategy, stack, plan, factors, tokens)
        multiply = sorted_forward(layout, factors[:2], c_Q1, spans)
        return lambda x, base, reuse: multiply(x) if base is None else multiply(x).add_(base)
    if strategy == "rows":
        return lambda x, base, reuse: _by_rows(x, factors, base, reuse)
    return lambda x, base, reuse: undifferentiated(x, *factors, base, reuse)


def _by_rows(x_TD: torch.Tensor, factors: _Factors, base_TO: torch.Tensor | None, reuse: bool) -> torch.Tensor:
    """Factors ``(N, ...)`` of ``N`` equal runs of tokens."""
    tokens, width = x_TD.shape
    runs = factors.a.shape[0]
    base = None if base_TO is None else base_TO.view(runs, -1, base_TO.shape[1])
    return undifferentiated(x_TD.view(runs, -1, width), *factors, base, reuse).view(tokens, -1)


def _run(
    strategy: Strategy,
    x_BTD: torch.Tensor,
    stack: LoraStack,
    plan: GroupPlan,
    prepared: _Prepared,
    base_BTO: torch.Tensor | None,
) -> torch.Tensor:
    """A strategy with its gradients."""
    batch, tokens, _ = x_BTD.shape
    if strategy == "none":
        return _nothing(x_BTD, stack, base_BTO)
    x_TD, base_TO = x_BTD.reshape(batch * tokens, -1), None
    if base_BTO is not None:
        base_TO = base_BTO.reshape(batch * tokens, -1)
    if strategy == "bag":
        bags, c_T = _bags(stack, plan, batch * tokens)
        return bag_lowrank(x_TD, stack, c_T, base_TO, bags).view(batch, tokens, -1)
    with torch.inference_mode(False):
        factors = _factors_of(strategy, stack, plan, prepared)
    if strategy in ("segments", "grouped_mm", "padded"):
        layout, c_Q1, spans = _sorted(strategy, stack, plan, factors, batch * tokens)
        return routed_lowrank(x_TD, factors[:2], c_Q1, base_TO, layout, spans).view(batch, tokens, -1)
    if strategy == "rows" and plan.ids.dim() == 2:
        base = None if base_TO is None else base_TO.unsqueeze(1)
        return lowrank(x_TD.unsqueeze(1), *factors, base).view(batch, tokens, -1)
    return lowrank(x_BTD, *factors, base_BTO)


def _gather_single(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """Views of the one adapter's factors."""
    adapter = plan.distinct[0]
    return _Factors(*stack.factors(adapter), _number(stack.scaling_E[adapter], stack))


def _gather_rows(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """Each entry's own factors, cut to the largest rank that occurs; one number when all scalings are equal."""
    rank = max(stack.ranks[adapter] for adapter in plan.distinct)
    masked = plan.lowest < 0 or any(stack.ranks[adapter] != rank for adapter in plan.distinct)
    a, b, c = _row_factors(stack, plan.ids.reshape(-1), rank, masked=masked)
    scaling_U = stack.scaling_E[list(plan.distinct)]
    if scaling_U.requires_grad or not bool((scaling_U == scaling_U[0]).all()):
        return _Factors(a, b, c)
    return _Factors(a, b, _number(scaling_U[0], stack))


def _gather_stacked(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """The rows of the adapters that occur (views where they lie side by side), and a mask with the scaling in it."""
    first, end = stack.offsets[plan.distinct[0]], stack.offsets[plan.distinct[-1] + 1]
    active_R: slice | torch.Tensor = slice(first, end)
    if end - first > sum(stack.ranks[adapter] for adapter in plan.distinct):
        distinct = torch.tensor(plan.distinct, device=stack.a_RD.device)
        active_R = torch.isin(stack.index.adapter_R, distinct).nonzero().squeeze(1)
    adapter_R = stack.index.adapter_R[active_R]
    ids = plan.ids[:, None, None] if plan.ids.dim() == 1 else plan.ids[:, :, None]
    c = torch.where(ids == adapter_R, stack.scaling_E.to(stack.a_RD.dtype)[adapter_R], 0.0)
    return _Factors(stack.a_RD[active_R], stack.b_RO[active_R], c)


def _gather_segments(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """All factors as they lie, and the scaling of every entry."""
    return _Factors(stack.a_RD, stack.b_RO, _entry_scaling(stack, plan))


def _gather_padded(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """Factors of the adapters that occur, with one rank for all."""
    return _Factors(*equal_factors(stack, _with_rank(stack, plan), aligned=False), _entry_scaling(stack, plan))


def _gather_grouped_mm(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """The same with a rank that ``grouped_mm`` accepts."""
    return _Factors(*equal_factors(stack, _with_rank(stack, plan), aligned=True), _entry_scaling(stack, plan))


_GATHER = {
    "single": _gather_single,
    "rows": _gather_rows,
    "stacked": _gather_stacked,
    "segments": _gather_segments,
    "grouped_mm": _gather_grouped_mm,
    "padded": _gather_padded,
}


def _with_rank(stack: LoraStack, plan: GroupPlan) -> tuple[int, ...]:
    """The adapters of the layout."""
    return laid_out(tuple(adapter for adapter in plan.distinct if stack.ranks[adapter]), stack.ranks)


def _entry_scaling(stack: LoraStack, plan: GroupPlan) -> torch.Tensor:
    """``(N,)`` the scaling of each entry's adapter; any number where it has none."""
    return stack.scaling_E.to(stack.a_RD.dtype)[plan.ids.reshape(-1).clamp(min=0)]


def _number(scaling: torch.Tensor, stack: LoraStack) -> torch.Tensor | float:
    """A scaling as a number where reading it is cheap and nothing trains it."""
    if scaling.requires_grad or scaling.device.type != "cpu":
        return scaling.to(stack.a_RD.dtype)
    return scaling.item()


def _row_factors(
    stack: LoraStack, ids_N: torch.Tensor, rank: int, *, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of each entry, ``(N, r, D)`` and ``(N, r, O)``, and coefficients ``(N, 1, r)``.

    ``masked`` sets unused places to 0; without it the caller knows that there are none.
    """
    line_N = torch.where(ids_N < 0, stack.num_adapters, ids_N)
    rows_Nr, valid_Nr = stack.index.table_Er[line_N, :rank], stack.index.valid_Er[line_N, :rank]
    a = stack.a_RD.index_select(0, rows_Nr.reshape(-1)).view(-1, rank, stack.a_RD.shape[1])
    b = stack.b_RO.index_select(0, rows_Nr.reshape(-1)).view(-1, rank, stack.b_RO.shape[1])
    if masked:
        a, b = a.masked_fill(~valid_Nr[..., None], 0.0), b.masked_fill(~valid_Nr[..., None], 0.0)
    scaling_N = stack.scaling_E.to(a.dtype)[ids_N.clamp(min=0)]
    return a, b, torch.where(valid_Nr, scaling_N[:, None], 0.0)[:, None]


def _sorted(
    strategy: Strategy, stack: LoraStack, plan: GroupPlan, factors: _Factors, tokens: int
) -> tuple[Layout, torch.Tensor, Spans]:
    """Layout (kept by the plan for stacks of these ranks), coefficients of its lines, rank rows per adapter."""
    if strategy == "grouped_mm" and (reason := grouped_mm_refuses(stack)):
        raise BackendUnavailableError(f"grouped_lora: grouped_mm cannot run here: {reason}; use another strategy")
    per_entry = tokens // len(plan.order)
    padded = strategy == "padded"
    key, found = (stack.ranks, padded), plan.layouts.get((stack.ranks, padded))
    if found is None or found[0] != per_entry:
        with torch.inference_mode(False):
            found = per_entry, sort_tokens(plan, stack.ranks, tokens=per_entry, padded=padded)
        plan.layouts[key] = found
    layout: Layout = found[1]
    c_N = cast("torch.Tensor", factors.c)
    c_P = c_N if per_entry == 1 else c_N.repeat_interleave(per_entry)
    spans = tuple((stack.offsets[e], stack.offsets[e + 1]) for e in layout.adapters) if strategy == "segments" else ()
    return layout, layout.spread(c_P), spans


def _bags(stack: LoraStack, plan: GroupPlan, tokens: int) -> tuple[Bags, torch.Tensor]:
    """The rank rows of every token, kept by the plan for stacks of these ranks, and its scaling ``(T,)``."""
    ids_T = plan.ids.reshape(-1).repeat_interleave(tokens // len(plan.order))
    key, found = (stack.ranks, "bag"), plan.layouts.get((stack.ranks, "bag"))
    if found is None or found[0] != tokens:
        with torch.inference_mode(False):
            found = plan.layouts[key] = tokens, make_bags(stack, ids_T[:, None])
    return found[1], stack.scaling_E.to(stack.a_RD.dtype)[ids_T.clamp(min=0)]


def _traced(x_BTD: torch.Tensor, stack: LoraStack, ids: torch.Tensor, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """No host reads, so ``torch.compile`` sees one graph: gather per batch row, mask the whole stack per token."""
    if ids.dim() == 1:
        return lowrank(x_BTD, *_row_factors(stack, ids, stack.max_rank, masked=True), base_BTO)
    scaling_R = stack.scaling_E.to(x_BTD.dtype)[stack.index.adapter_R]
    c = torch.where(ids[..., None] == stack.index.adapter_R, scaling_R, 0.0)
    return lowrank(x_BTD, stack.a_RD, stack.b_RO, c, base_BTO)


def _nothing(x_BTD: torch.Tensor, stack: LoraStack, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """No adapter acts: a copy of base, or zeros."""
    if base_BTO is not None:
        return base_BTO.clone()
    return x_BTD.new_zeros(*x_BTD.shape[:2], stack.b_RO.shape[1])
