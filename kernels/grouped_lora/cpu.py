"""Fast torch path of ``grouped_lora``: its strategies, and the measured policy that picks one (README).

Shape letters: ``B`` batch, ``T`` tokens, ``N`` entries of ids, ``D`` in, ``O`` out, ``R`` rank rows, ``r`` padded
rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch

from compose.errors import BackendUnavailableError
from compose.kernels import policy
from compose.kernels.bags import bag_lowrank, make_bags
from compose.kernels.grouped_lora.plan import GroupPlan
from compose.kernels.lowrank import differentiated, lowrank
from compose.kernels.routed import (
    copies_factors,
    equal_factors,
    grouped_mm_refuses,
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
    flat = x.dim() == 2
    x_BTD, base_BTO = (x.unsqueeze(1), None if base is None else base.unsqueeze(1)) if flat else (x, base)
    if stack.num_rows == 0 or x.numel() == 0:
        y = _nothing(x_BTD, stack, base_BTO)
    elif plan is None or torch.compiler.is_compiling():
        y = _traced(x_BTD, stack, ids, base_BTO)
    else:
        prepared = _prepared(stack, plan)
        training = differentiated(x, stack.a_RD, stack.b_RO, stack.scaling_E, base)
        strategy = strategy or _choice(stack, plan, prepared, x_BTD.shape[0] * x_BTD.shape[1], training)
        y = _run(strategy, x_BTD, stack, plan, prepared, base_BTO, reuse_base)
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
    copies = bool(counts) and copies_factors(stack, tuple(counts), max(ranks))
    return policy.Work(
        tokens=tokens,
        lists=len(plan.order),
        chosen=1,
        rank=max(ranks, default=0),
        adapters=len(counts),
        active_rows=sum(ranks),
        all_rows=stack.num_rows,
        longest=max(counts.values(), default=0) * per_entry,
        products=sum(count * stack.ranks[adapter] for adapter, count in counts.items()) * per_entry,
        copied_rows=len(ranks) * max(ranks) if copies else 0,
        width=stack.a_RD.shape[1] + stack.b_RO.shape[1],
        itemsize=stack.a_RD.dtype.itemsize,
    )


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
        choices: The policy's choice by number of tokens, and whether backward follows.
    """

    versions: tuple[int, int, int] | None
    factors: dict[str, _Factors] = field(default_factory=dict)
    choices: dict[tuple[int, bool], Strategy] = field(default_factory=dict)


def _prepared(stack: LoraStack, plan: GroupPlan) -> _Prepared:
    """Look up or start the record of ``stack``; what was gathered is dropped when a factor has been written to since.

    Where the stack has no versions to compare, every call gathers anew.
    """
    versions = stack.versions()
    found = plan.gathered.get(stack)
    if found is None or versions is None or found.versions != versions:
        found = plan.gathered[stack] = _Prepared(versions, choices={} if found is None else found.choices)
    return found


def _choice(stack: LoraStack, plan: GroupPlan, prepared: _Prepared, tokens: int, training: bool) -> Strategy:
    """``choose``, remembered."""
    if (tokens, training) not in prepared.choices:
        prepared.choices[tokens, training] = choose(stack, plan, tokens, training=training)
    return prepared.choices[tokens, training]


def _run(
    strategy: Strategy,
    x_BTD: torch.Tensor,
    stack: LoraStack,
    plan: GroupPlan,
    prepared: _Prepared,
    base_BTO: torch.Tensor | None,
    reuse_base: bool,
) -> torch.Tensor:
    if strategy == "none":
        return _nothing(x_BTD, stack, base_BTO)
    if strategy == "bag":
        return _bag(x_BTD, stack, plan, base_BTO)
    factors = prepared.factors.get(strategy)
    if factors is None:
        with torch.inference_mode(False):
            factors = _GATHER[strategy](stack, plan)
        if prepared.versions is not None:
            prepared.factors[strategy] = factors
    if strategy in ("segments", "grouped_mm", "padded"):
        return _routed(strategy, x_BTD, stack, plan, factors, base_BTO)
    if strategy == "rows" and plan.ids.dim() == 2:
        batch, tokens, _ = x_BTD.shape
        x_BTD = x_BTD.reshape(batch * tokens, 1, -1)
        base = None if base_BTO is None else base_BTO.reshape(batch * tokens, 1, -1)
        return lowrank(x_BTD, *factors, base).view(batch, tokens, -1)
    return lowrank(x_BTD, *factors, base_BTO, reuse_base=reuse_base)


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
    """The rows of the adapters that occur, and a mask per entry with the scaling in it."""
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
    return tuple(adapter for adapter in plan.distinct if stack.ranks[adapter])


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


def _routed(
    strategy: Strategy,
    x_BTD: torch.Tensor,
    stack: LoraStack,
    plan: GroupPlan,
    factors: _Factors,
    base_BTO: torch.Tensor | None,
) -> torch.Tensor:
    """Sort tokens by adapter, multiply, sort back; the layout is kept by the plan for all stacks of these ranks."""
    if strategy == "grouped_mm" and (reason := grouped_mm_refuses(stack)):
        raise BackendUnavailableError(f"grouped_lora: grouped_mm cannot run here: {reason}; use another strategy")
    batch, tokens, _ = x_BTD.shape
    per_entry = batch * tokens // len(plan.order)
    padded = strategy == "padded"
    key, found = (stack.ranks, padded), plan.layouts.get((stack.ranks, padded))
    if found is None or found[0] != per_entry:
        with torch.inference_mode(False):
            found = per_entry, sort_tokens(plan, stack.ranks, tokens=per_entry, padded=padded)
        plan.layouts[key] = found
    layout = found[1]
    c_N = cast("torch.Tensor", factors.c)
    c_P = c_N if per_entry == 1 else c_N.repeat_interleave(per_entry)
    spans = tuple((stack.offsets[e], stack.offsets[e + 1]) for e in layout.adapters) if strategy == "segments" else ()
    base_TO = None if base_BTO is None else base_BTO.reshape(batch * tokens, -1)
    y = routed_lowrank(
        x_BTD.reshape(batch * tokens, -1), (factors.a, factors.b), layout.spread(c_P), base_TO, layout, spans
    )
    return y.view(batch, tokens, -1)


def _bag(x_BTD: torch.Tensor, stack: LoraStack, plan: GroupPlan, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """All A rows at once, then only the own B rows of each token."""
    batch, tokens, _ = x_BTD.shape
    ids_T = (plan.ids if plan.ids.dim() == 2 else plan.ids[:, None].expand(batch, tokens)).reshape(-1)
    key, found = (stack.ranks, "bag"), plan.layouts.get((stack.ranks, "bag"))
    if found is None or found[0] != tokens:
        with torch.inference_mode(False):
            found = plan.layouts[key] = tokens, make_bags(stack, ids_T[:, None])
    c_T = stack.scaling_E.to(x_BTD.dtype)[ids_T.clamp(min=0)]
    base_TO = None if base_BTO is None else base_BTO.reshape(batch * tokens, -1)
    return bag_lowrank(x_BTD.reshape(batch * tokens, -1), stack, c_T, base_TO, found[1]).view(batch, tokens, -1)


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
