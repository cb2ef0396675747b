"""Fast torch path of ``grouped_lora``: five strategies and the measured policy that picks one (README).

Shape letters: ``B`` batch, ``T`` tokens, ``N`` entries of ids, ``D`` in, ``O`` out, ``R`` rank rows, ``r`` padded
rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from compose.kernels.grouped_lora.plan import GroupPlan
from compose.kernels.lowrank import lowrank
from compose.kernels.policy import gather_cost, segments_cost, stacked_cost
from compose.kernels.stack import LoraStack

Strategy = Literal["none", "single", "rows", "stacked", "segments"]


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
        strategy = strategy or _choice(stack, plan, prepared, x_BTD.shape[0] * x_BTD.shape[1])
        y = _run(strategy, x_BTD, stack, plan, prepared, base_BTO, reuse_base)
    return y.squeeze(1) if flat else y


def choose(stack: LoraStack, plan: GroupPlan, tokens: int, *, cached: bool) -> Strategy:
    """The cheapest strategy by the cost model of ``compose.kernels.policy``.

    Args:
        stack: Of the target.
        plan: Of the ids.
        tokens: ``B T``.
        cached: Whether gathered factors are kept from call to call.
    """
    ranks = [stack.ranks[adapter] for adapter in plan.distinct]
    if sum(ranks) == 0:
        return "none"
    if plan.single is not None:
        return "single"
    width = stack.a_RD.shape[1] + stack.b_RO.shape[1]
    costs: dict[Strategy, float] = {
        "stacked": stacked_cost(tokens, sum(ranks), width),
        "rows": gather_cost(len(plan.order), tokens, max(ranks), width, cached=cached),
        "segments": segments_cost(tokens, len(ranks), width),
    }
    return min(costs, key=costs.__getitem__)


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
        choices: The policy's choice by number of tokens.
    """

    versions: tuple[int, int, int] | None
    factors: dict[str, _Factors] = field(default_factory=dict)
    choices: dict[int, Strategy] = field(default_factory=dict)


def _prepared(stack: LoraStack, plan: GroupPlan) -> _Prepared:
    """Look up or start the record of ``stack``; what was gathered is dropped when a factor has been written to since.

    Where the stack has no versions to compare, every call gathers anew.
    """
    versions = stack.versions()
    found = plan.gathered.get(stack)
    if found is None or versions is None or found.versions != versions:
        found = plan.gathered[stack] = _Prepared(versions)
    return found


def _choice(stack: LoraStack, plan: GroupPlan, prepared: _Prepared, tokens: int) -> Strategy:
    """``choose``, remembered per number of tokens."""
    if tokens not in prepared.choices:
        prepared.choices[tokens] = choose(stack, plan, tokens, cached=prepared.versions is not None)
    return prepared.choices[tokens]


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
    if strategy == "segments":
        return _segments(x_BTD, stack, plan, base_BTO)
    factors = prepared.factors.get(strategy)
    if factors is None:
        with torch.inference_mode(False):
            factors = _GATHER[strategy](stack, plan)
        if prepared.versions is not None:
            prepared.factors[strategy] = factors
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


_GATHER = {"single": _gather_single, "rows": _gather_rows, "stacked": _gather_stacked}


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


def _segments(x_BTD: torch.Tensor, stack: LoraStack, plan: GroupPlan, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """Sort entries by adapter, one pair of products per adapter, sort back."""
    entries = x_BTD if plan.ids.dim() == 1 else x_BTD.reshape(1, -1, x_BTD.shape[-1]).transpose(0, 1)
    sorted_x = entries.index_select(0, plan.order)
    out = stack.b_RO.shape[1]
    parts = [sorted_x.new_zeros(plan.bounds[0], entries.shape[1], out)]
    for number, adapter in enumerate(plan.distinct):
        part = sorted_x[plan.bounds[number] : plan.bounds[number + 1]]
        c = stack.scaling_E[adapter].to(x_BTD.dtype)
        parts.append(lowrank(part, *stack.factors(adapter), c, None))
    delta = torch.cat(parts).index_select(0, plan.inverse).view(*x_BTD.shape[:2], out)
    return delta if base_BTO is None else base_BTO + delta


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
