"""Fast torch path of ``grouped_lora``: four strategies and the measured policy that picks one (README).

Shape letters: ``B`` batch, ``T`` tokens, ``N`` tokens of all rows, ``D`` in, ``O`` out, ``R`` rank rows, ``r`` padded rank.
"""

from __future__ import annotations

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
    strategy: Strategy | None = None,
) -> torch.Tensor:
    """See ``op.grouped_lora``; ``strategy`` overrides the policy. Without a plan (tracing) nothing is read on the host."""
    x_BTD, base_BTO = _three_dim(x), None if base is None else _three_dim(base)
    if stack.num_rows == 0 or x.numel() == 0:
        y = _nothing(x_BTD, stack, base_BTO)
    elif torch.compiler.is_compiling() or plan is None:
        y = _traced(x_BTD, stack, ids, base_BTO)
    else:
        y = _run(strategy or choose(x_BTD, stack, plan), x_BTD, stack, plan, base_BTO)
    return y if x.dim() == 3 else y.squeeze(1)


def choose(x_BTD: torch.Tensor, stack: LoraStack, plan: GroupPlan) -> Strategy:
    """The measured policy; the README has the figures."""
    rows = sum(stack.ranks[adapter] for adapter in plan.distinct)
    if rows == 0:
        return "none"
    if plan.single is not None:
        return "single"
    tokens = x_BTD.shape[0] * x_BTD.shape[1]
    if rows <= 32:
        return "stacked"
    if plan.ids.dim() == 1 and (x_BTD.shape[1] >= 8 or tokens <= 128):
        return "rows"
    return "segments"


def _run(
    strategy: Strategy, x_BTD: torch.Tensor, stack: LoraStack, plan: GroupPlan, base_BTO: torch.Tensor | None
) -> torch.Tensor:
    if strategy == "none":
        return _nothing(x_BTD, stack, base_BTO)
    if strategy == "single":
        return _single(x_BTD, stack, plan.distinct[0], base_BTO)
    if strategy == "segments":
        return _segments(x_BTD, stack, plan, base_BTO)
    if strategy == "stacked":
        factors = _cached(stack, plan, "stacked")
        return lowrank(x_BTD, factors.a, factors.b, factors.c, base_BTO)
    factors = _cached(stack, plan, "rows")
    if plan.ids.dim() == 2:
        batch, tokens, _ = x_BTD.shape
        flat_base = None if base_BTO is None else base_BTO.reshape(batch * tokens, 1, -1)
        flat = lowrank(x_BTD.reshape(batch * tokens, 1, -1), factors.a, factors.b, factors.c, flat_base)
        return flat.view(batch, tokens, -1)
    return lowrank(x_BTD, factors.a, factors.b, factors.c, base_BTO)


class _Factors(NamedTuple):
    """Factors and coefficients gathered for one plan, with the versions of the tensors they were read from."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    strategy: str
    versions: tuple[int, int, int]


def _cached(stack: LoraStack, plan: GroupPlan, strategy: Literal["rows", "stacked"]) -> _Factors:
    """Gather once per plan and stack; again whenever a factor was written to. Trained stacks are never cached."""
    sources = (stack.a_RD, stack.b_RO, stack.scaling_E)
    if any(tensor.requires_grad or tensor.is_inference() for tensor in sources):
        return _gather(stack, plan, strategy, (0, 0, 0))
    versions = (stack.a_RD._version, stack.b_RO._version, stack.scaling_E._version)
    found = plan.gathered.get(stack)
    if found is None or found.versions != versions or found.strategy != strategy:
        with torch.inference_mode(False):
            found = _gather(stack, plan, strategy, versions)
        plan.gathered[stack] = found
    return found


def _gather(
    stack: LoraStack, plan: GroupPlan, strategy: Literal["rows", "stacked"], versions: tuple[int, int, int]
) -> _Factors:
    if strategy == "rows":
        return _Factors(*_row_factors(stack, plan.ids.reshape(-1)), strategy, versions)
    distinct = torch.tensor(plan.distinct, device=stack.a_RD.device)
    active_R = torch.isin(stack.row_adapter_R, distinct).nonzero().squeeze(1)
    adapter_R = stack.row_adapter_R[active_R]
    ids = plan.ids[:, None, None] if plan.ids.dim() == 1 else plan.ids[:, :, None]
    scaling_R = stack.scaling_E.to(stack.a_RD.dtype)[adapter_R]
    c = torch.where(ids == adapter_R, scaling_R, 0.0)
    return _Factors(stack.a_RD[active_R], stack.b_RO[active_R], c, strategy, versions)


def _row_factors(stack: LoraStack, ids_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of each entry, ``(N, r, D)`` and ``(N, r, O)``, and coefficients ``(N, 1, r)``; unused places are 0."""
    line_N = torch.where(ids_N < 0, stack.num_adapters, ids_N)
    rows_Nr, valid_Nr = stack.row_table_Er[line_N], stack.row_valid_Er[line_N]
    shape = (len(ids_N), stack.max_rank, -1)
    a = stack.a_RD.index_select(0, rows_Nr.reshape(-1)).view(shape).masked_fill(~valid_Nr[..., None], 0.0)
    b = stack.b_RO.index_select(0, rows_Nr.reshape(-1)).view(shape).masked_fill(~valid_Nr[..., None], 0.0)
    scaling_N = stack.scaling_E.to(a.dtype)[ids_N.clamp(min=0)]
    return a, b, torch.where(valid_Nr, scaling_N[:, None], 0.0)[:, None]


def _single(x_BTD: torch.Tensor, stack: LoraStack, adapter: int, base_BTO: torch.Tensor | None) -> torch.Tensor:
    rows = slice(stack.offsets[adapter], stack.offsets[adapter + 1])
    c = stack.scaling_E[adapter].to(x_BTD.dtype)
    return lowrank(x_BTD, stack.a_RD[rows], stack.b_RO[rows], c, base_BTO)


def _segments(
    x_BTD: torch.Tensor, stack: LoraStack, plan: GroupPlan, base_BTO: torch.Tensor | None
) -> torch.Tensor:
    """Sort entries by adapter, one pair of products per adapter, sort back."""
    entries = x_BTD if plan.ids.dim() == 1 else x_BTD.reshape(-1, 1, x_BTD.shape[-1])
    sorted_x = entries.index_select(0, plan.order)
    out = stack.b_RO.shape[1]
    parts = [sorted_x.new_zeros(plan.bounds[0], entries.shape[1], out)]
    for number, adapter in enumerate(plan.distinct):
        part = sorted_x[plan.bounds[number] : plan.bounds[number + 1]]
        parts.append(_single(part, stack, adapter, None))
    delta = torch.cat(parts).index_select(0, plan.inverse).view(*x_BTD.shape[:2], out)
    return delta if base_BTO is None else base_BTO + delta


def _traced(
    x_BTD: torch.Tensor, stack: LoraStack, ids: torch.Tensor, base_BTO: torch.Tensor | None
) -> torch.Tensor:
    """No host reads, so ``torch.compile`` sees one graph: gather per batch row, mask the whole stack per token."""
    if ids.dim() == 1:
        return lowrank(x_BTD, *_row_factors(stack, ids), base_BTO)
    scaling_R = stack.scaling_E.to(x_BTD.dtype)[stack.row_adapter_R]
    c = torch.where(ids[..., None] == stack.row_adapter_R, scaling_R, 0.0)
    return lowrank(x_BTD, stack.a_RD, stack.b_RO, c, base_BTO)


def _nothing(x_BTD: torch.Tensor, stack: LoraStack, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """No adapter acts: a copy of base, or zeros."""
    if base_BTO is not None:
        return base_BTO.clone()
    return x_BTD.new_zeros(*x_BTD.shape[:2], stack.b_RO.shape[1])


def _three_dim(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)
