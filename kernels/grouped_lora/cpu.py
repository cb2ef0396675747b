"""Fast torch path of ``grouped_lora``: five strategies and the measured policy that picks one (README).

Shape letters: ``B`` batch, ``T`` tokens, ``N`` entries of ids, ``D`` in, ``O`` out, ``R`` rank rows, ``r`` padded rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from compose.kernels.grouped_lora.plan import GroupPlan
from compose.kernels.lowrank import lowrank
from compose.kernels.stack import LoraStack

Strategy = Literal["none", "single", "rows", "stacked", "segments"]


def supports(x: torch.Tensor, stack: LoraStack) -> str | None:  # noqa: ARG001
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
        strategy = strategy or choose(prepared.active_rows, x_BTD.shape[1], plan)
        y = _run(strategy, x_BTD, stack, plan, prepared, base_BTO, reuse_base)
    return y.squeeze(1) if flat else y


def choose(active_rows: int, tokens_per_row: int, plan: GroupPlan) -> Strategy:
    """The measured policy; the README has the figures.

    Args:
        active_rows: Ranks of the adapters that occur, added up.
        tokens_per_row: ``T``.
        plan: Of the ids.
    """
    if active_rows == 0:
        return "none"
    if plan.single is not None:
        return "single"
    per_row = plan.ids.dim() == 1
    if per_row and (tokens_per_row >= 8 or len(plan.order) <= 128):
        return "rows"
    return "stacked" if active_rows <= 64 else "segments"


class _Factors(NamedTuple):
    """Operands of ``lowrank``."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor | float


@dataclass
class _Prepared:
    """What is kept per plan and stack: gathered factors, and the versions of the tensors they were read from."""

    active_rows: int
    versions: tuple[int, int, int] | None
    factors: dict[str, _Factors] = field(default_factory=dict)


def _prepared(stack: LoraStack, plan: GroupPlan) -> _Prepared:
    """Look up or start the record of ``stack``; what was gathered is dropped when a factor has been written to since.

    Trained factors are gathered by every call, so that gradients reach them, and so are inference tensors, which
    carry no version to check.
    """
    a, b, scaling = stack.a_RD, stack.b_RO, stack.scaling_E
    versions = None
    if not (a.requires_grad or b.requires_grad or scaling.requires_grad):
        if not (a.is_inference() or b.is_inference() or scaling.is_inference()):
            versions = (a._version, b._version, scaling._version)
    found = plan.gathered.get(stack)
    if found is None:
        found = _Prepared(sum(stack.ranks[adapter] for adapter in plan.distinct), versions)
        plan.gathered[stack] = found
    elif versions is None or found.versions != versions:
        found.factors.clear()
        found.versions = versions
    return found


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
    rows = slice(stack.offsets[adapter], stack.offsets[adapter + 1])
    return _Factors(stack.a_RD[rows], stack.b_RO[rows], _number(stack.scaling_E[adapter], stack))


def _gather_rows(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """Each entry's own factors, cut to the largest rank that occurs; one number when all scalings are equal."""
    rank = max(stack.ranks[adapter] for adapter in plan.distinct)
    a, b, c = _row_factors(stack, plan.ids.reshape(-1), rank)
    scaling_U = stack.scaling_E[list(plan.distinct)]
    if scaling_U.requires_grad or not bool((scaling_U == scaling_U[0]).all()):
        return _Factors(a, b, c)
    return _Factors(a, b, _number(scaling_U[0], stack))


def _gather_stacked(stack: LoraStack, plan: GroupPlan) -> _Factors:
    """The rows of the adapters that occur, and a mask per entry with the scaling in it."""
    distinct = torch.tensor(plan.distinct, device=stack.a_RD.device)
    active_R = torch.isin(stack.row_adapter_R, distinct).nonzero().squeeze(1)
    adapter_R = stack.row_adapter_R[active_R]
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
    stack: LoraStack, ids_N: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of each entry, ``(N, r, D)`` and ``(N, r, O)``, and coefficients ``(N, 1, r)``; unused places are 0."""
    line_N = torch.where(ids_N < 0, stack.num_adapters, ids_N)
    rows_Nr, valid_Nr = stack.row_table_Er[line_N, :rank], stack.row_valid_Er[line_N, :rank]
    unused = ~valid_Nr[..., None]
    a = stack.a_RD.index_select(0, rows_Nr.reshape(-1)).view(-1, rank, stack.a_RD.shape[1]).masked_fill(unused, 0.0)
    b = stack.b_RO.index_select(0, rows_Nr.reshape(-1)).view(-1, rank, stack.b_RO.shape[1]).masked_fill(unused, 0.0)
    scaling_N = stack.scaling_E.to(a.dtype)[ids_N.clamp(min=0)]
    return a, b, torch.where(valid_Nr, scaling_N[:, None], 0.0)[:, None]


def _segments(
    x_BTD: torch.Tensor, stack: LoraStack, plan: GroupPlan, base_BTO: torch.Tensor | None
) -> torch.Tensor:
    """Sort entries by adapter, one pair of products per adapter, sort back."""
    entries = x_BTD if plan.ids.dim() == 1 else x_BTD.reshape(1, -1, x_BTD.shape[-1]).transpose(0, 1)
    sorted_x = entries.index_select(0, plan.order)
    out = stack.b_RO.shape[1]
    parts = [sorted_x.new_zeros(plan.bounds[0], entries.shape[1], out)]
    for number, adapter in enumerate(plan.distinct):
        rows = slice(stack.offsets[adapter], stack.offsets[adapter + 1])
        part = sorted_x[plan.bounds[number] : plan.bounds[number + 1]]
        c = stack.scaling_E[adapter].to(x_BTD.dtype)
        parts.append(lowrank(part, stack.a_RD[rows], stack.b_RO[rows], c, None))
    delta = torch.cat(parts).index_select(0, plan.inverse).view(*x_BTD.shape[:2], out)
    return delta if base_BTO is None else base_BTO + delta


def _traced(
    x_BTD: torch.Tensor, stack: LoraStack, ids: torch.Tensor, base_BTO: torch.Tensor | None
) -> torch.Tensor:
    """No host reads, so ``torch.compile`` sees one graph: gather per batch row, mask the whole stack per token."""
    if ids.dim() == 1:
        return lowrank(x_BTD, *_row_factors(stack, ids, stack.max_rank), base_BTO)
    scaling_R = stack.scaling_E.to(x_BTD.dtype)[stack.row_adapter_R]
    c = torch.where(ids[..., None] == stack.row_adapter_R, scaling_R, 0.0)
    return lowrank(x_BTD, stack.a_RD, stack.b_RO, c, base_BTO)


def _nothing(x_BTD: torch.Tensor, stack: LoraStack, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """No adapter acts: a copy of base, or zeros."""
    if base_BTO is not None:
        return base_BTO.clone()
    return x_BTD.new_zeros(*x_BTD.shape[:2], stack.b_RO.shape[1])
