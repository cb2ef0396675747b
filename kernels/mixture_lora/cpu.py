"""Fast torch path of ``mixture_lora`` with outputs combined, and the measured policy that picks a strategy (README).

Shape letters: ``B`` batch, ``T`` tokens, ``N`` tokens of all rows, ``D`` in, ``O`` out, ``E`` adapters, ``K`` chosen per
entry, ``R`` rank rows, ``r`` padded rank.
"""

from __future__ import annotations

from typing import Literal

import torch

from compose.kernels.lowrank import lowrank
from compose.kernels.mixture_lora import parameters
from compose.kernels.stack import LoraStack

DenseStrategy = Literal["none", "select", "stacked"]
SparseStrategy = Literal["gather", "scatter", "pairs"]


def supports(x: torch.Tensor, stack: LoraStack) -> str | None:  # noqa: ARG001
    """Plain torch operators only, so it runs everything, on any device."""
    return None


def forward(
    x: torch.Tensor,
    stack: LoraStack,
    gates: torch.Tensor,
    indices: torch.Tensor | None,
    *,
    base: torch.Tensor | None,
    combine: str,
    strategy: str | None = None,
) -> torch.Tensor:
    """See ``op.mixture_lora``; ``strategy`` overrides the policy."""
    x_BTD, base_BTO = _three_dim(x), None if base is None else _three_dim(base)
    if gates.dim() == 2:  # one line of gates per row: (B, 1, E)
        gates, indices = gates.unsqueeze(1), None if indices is None else indices.unsqueeze(1)
    if stack.num_rows == 0 or x.numel() == 0:
        y = base_BTO.clone() if base_BTO is not None else x_BTD.new_zeros(*x_BTD.shape[:2], stack.b_RO.shape[1])
    elif combine == "parameters":
        dense = gates if indices is None else scatter(gates, indices, stack.num_adapters)
        y = parameters.forward(x_BTD, stack, dense, base_BTO)
    elif indices is None:
        y = _dense(x_BTD, stack, gates, base_BTO, strategy)
    else:
        y = _sparse(x_BTD, stack, gates, indices, base_BTO, strategy)
    return y if x.dim() == 3 else y.squeeze(1)


def scatter(gates: torch.Tensor, indices: torch.Tensor, num_adapters: int) -> torch.Tensor:
    """Sparse gates ``(…, K)`` as dense ones ``(…, E)``; repeated indices add up, -1 is dropped."""
    places = torch.where(indices < 0, num_adapters, indices)
    dense = gates.new_zeros(*gates.shape[:-1], num_adapters + 1)
    return dense.scatter_add(-1, places, gates)[..., :num_adapters]


def choose_dense(stack: LoraStack, gates: torch.Tensor) -> tuple[DenseStrategy, list[int]]:
    """Drop adapters with gate 0 where that is exact and pays: one list of gates for all, and nothing of it is trained."""
    tensors = (gates, stack.a_RD, stack.b_RO, stack.scaling_E)
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if gates.dim() != 1 or trained or torch.compiler.is_compiling() or gates.device.type != "cpu":
        return "stacked", []
    active = [adapter for adapter, gate in enumerate(gates.tolist()) if gate != 0.0 and stack.ranks[adapter]]
    if not active:
        return "none", active
    pays = len(active) == 1 or 2 * sum(stack.ranks[adapter] for adapter in active) <= stack.num_rows
    return ("select", active) if pays else ("stacked", [])


def choose_sparse(x_BTD: torch.Tensor, stack: LoraStack, gates: torch.Tensor) -> SparseStrategy:
    """The measured policy for gates with indices; the README has the figures."""
    chosen = gates.shape[-1]
    if gates.dim() == 1 or gates.shape[1] == 1:
        return "gather" if 2 * chosen * stack.max_rank <= stack.num_rows else "scatter"
    if stack.num_rows <= 64 * chosen or torch.compiler.is_compiling():
        return "scatter"
    return "pairs"


def _dense(
    x_BTD: torch.Tensor, stack: LoraStack, gates: torch.Tensor, base_BTO: torch.Tensor | None, forced: str | None
) -> torch.Tensor:
    strategy, active = choose_dense(stack, gates)
    if strategy == "none" and forced is None:
        return base_BTO.clone() if base_BTO is not None else x_BTD.new_zeros(*x_BTD.shape[:2], stack.b_RO.shape[1])
    if strategy == "stacked" or forced == "stacked":
        c = stack.row_coefficients(gates).to(x_BTD.dtype)
        return lowrank(x_BTD, stack.a_RD, stack.b_RO, c, base_BTO)
    if len(active) == 1:
        rows = slice(stack.offsets[active[0]], stack.offsets[active[0] + 1])
        c = (gates[active[0]] * stack.scaling_E[active[0]].to(gates.dtype)).to(x_BTD.dtype)
        return lowrank(x_BTD, stack.a_RD[rows], stack.b_RO[rows], c, base_BTO)
    c = stack.row_coefficients(gates).to(x_BTD.dtype)
    rows_R = torch.tensor([row for adapter in active for row in range(stack.offsets[adapter], stack.offsets[adapter + 1])])
    return lowrank(
        x_BTD, stack.a_RD.index_select(0, rows_R), stack.b_RO.index_select(0, rows_R), c.index_select(0, rows_R), base_BTO
    )


def _sparse(
    x_BTD: torch.Tensor,
    stack: LoraStack,
    gates: torch.Tensor,
    indices: torch.Tensor,
    base_BTO: torch.Tensor | None,
    forced: str | None,
) -> torch.Tensor:
    strategy = forced or choose_sparse(x_BTD, stack, gates)
    if strategy == "scatter":
        c = stack.row_coefficients(scatter(gates, indices, stack.num_adapters)).to(x_BTD.dtype)
        return lowrank(x_BTD, stack.a_RD, stack.b_RO, c, base_BTO)
    if strategy == "pairs":
        return _pairs(x_BTD, stack, gates, indices, base_BTO)
    if gates.dim() == 3 and gates.shape[1] != 1:
        batch, tokens, chosen = gates.shape
        flat_base = None if base_BTO is None else base_BTO.reshape(batch * tokens, 1, -1)
        flat_x, flat = x_BTD.reshape(batch * tokens, 1, -1), (batch * tokens, 1, chosen)
        return _sparse(flat_x, stack, gates.reshape(flat), indices.reshape(flat), flat_base, "gather").view(
            batch, tokens, -1
        )
    lead = indices.shape[:-2]  # () for one list of gates, (B,) for one per row
    line = torch.where(indices < 0, stack.num_adapters, indices)
    rows, valid = stack.row_table_Er[line], stack.row_valid_Er[line]
    flat_rows = rows.shape[-2] * rows.shape[-1]
    unused = ~valid.reshape(*lead, flat_rows, 1)
    a = stack.a_RD.index_select(0, rows.reshape(-1)).view(*lead, flat_rows, -1).masked_fill(unused, 0.0)
    b = stack.b_RO.index_select(0, rows.reshape(-1)).view(*lead, flat_rows, -1).masked_fill(unused, 0.0)
    scaled = gates * stack.scaling_E.to(gates.dtype)[indices.clamp(min=0)]
    c = torch.where(valid, scaled[..., None], 0.0).flatten(-2).to(x_BTD.dtype)
    return lowrank(x_BTD, a, b, c, base_BTO)


def _pairs(
    x_BTD: torch.Tensor,
    stack: LoraStack,
    gates: torch.Tensor,
    indices: torch.Tensor,
    base_BTO: torch.Tensor | None,
) -> torch.Tensor:
    """Sort (token, adapter) pairs by adapter; two products per adapter; sort back and add up the pairs of a token."""
    chosen = gates.shape[-1]
    sorted_ids, order = indices.reshape(-1).sort(stable=True)
    values, counts = sorted_ids.unique_consecutive(return_counts=True)
    token = order // chosen
    sorted_x = x_BTD.reshape(-1, x_BTD.shape[-1]).index_select(0, token)
    scaled = gates * stack.scaling_E.to(gates.dtype)[indices.clamp(min=0)]
    sorted_c = scaled.reshape(-1).index_select(0, order).to(x_BTD.dtype)
    parts, start = [], 0
    for adapter, count in zip(values.tolist(), counts.tolist(), strict=True):
        stop = start + count
        if adapter < 0:
            parts.append(sorted_x.new_zeros(count, stack.b_RO.shape[1]))
        else:
            rows = slice(stack.offsets[adapter], stack.offsets[adapter + 1])
            c = sorted_c[None, start:stop, None]
            parts.append(lowrank(sorted_x[None, start:stop], stack.a_RD[rows], stack.b_RO[rows], c, None)[0])
        start = stop
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    delta = torch.cat(parts).index_select(0, inverse).view(*x_BTD.shape[:2], chosen, -1).sum(2)
    return delta if base_BTO is None else base_BTO + delta


def _three_dim(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 3 else tensor.unsqueeze(1)
