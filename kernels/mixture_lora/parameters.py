"""Torch path of ``mixture_lora`` with parameters combined: the two gated factor sums, or two gated contractions.

Shape letters: ``B`` batch, ``T`` tokens, ``D`` in, ``O`` out, ``E`` adapters, ``R`` rank rows, ``r`` largest rank.
"""

from __future__ import annotations

import torch

from compose.kernels.lowrank import lowrank
from compose.kernels.mixture_lora.plan import Factors, MixturePlan, keeps, prepared
from compose.kernels.stack import LoraStack


def forward(
    x_BTD: torch.Tensor,
    stack: LoraStack,
    gates: torch.Tensor,
    base_BTO: torch.Tensor | None,
    *,
    reuse_base: bool = False,
    plan: MixturePlan | None = None,
) -> torch.Tensor:
    """``gates`` are ``(E,)``, ``(B, 1, E)`` or ``(B, T, E)``."""
    rows = stack.max_rank * (1 if gates.dim() == 1 else gates.shape[0])
    one_token = x_BTD.shape[1] == 1 and not keeps(plan, stack, gates, rows)
    if gates.dim() == 3 and (gates.shape[1] != 1 or one_token):
        return _contractions(x_BTD, stack, gates, base_BTO, reuse_base)

    def make() -> Factors:
        gates_a, gates_b = _signed_roots(stack, gates if gates.dim() == 1 else gates.squeeze(1), x_BTD.dtype)
        return Factors(_factor_sum(gates_a, stack.a_RD, stack), _factor_sum(gates_b, stack.b_RO, stack), 1.0)

    return lowrank(
        x_BTD, *prepared(plan, stack, gates, rows, make, kind="parameters"), base_BTO, reuse_base=reuse_base
    )


def _signed_roots(stack: LoraStack, gates: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates times ``√|s|`` for A, and times ``sgn(s) √|s|`` for B."""
    scaling_E = stack.scaling_E.to(gates.dtype)
    root_E = scaling_E.abs().sqrt()
    return (gates * root_E).to(dtype), (gates * (root_E * scaling_E.sign())).to(dtype)


def _factor_sum(gates: torch.Tensor, factor: torch.Tensor, stack: LoraStack) -> torch.Tensor:
    """``Σ_e g_e F_e`` with ranks padded by zero rows: ``(…, r, width)`` for gates ``(…, E)``."""
    rank, width = stack.max_rank, factor.shape[1]
    if all(other == rank for other in stack.ranks):
        padded = factor.reshape(stack.num_adapters, rank * width)
    else:
        table, valid = stack.index.table_Er[:-1], stack.index.valid_Er[:-1]
        padded = factor.index_select(0, table.reshape(-1)).view(stack.num_adapters, rank, width)
        padded = padded.masked_fill(~valid[..., None], 0.0).view(stack.num_adapters, rank * width)
    return (gates @ padded).view(*gates.shape[:-1], rank, width)


def _contractions(
    x_BTD: torch.Tensor, stack: LoraStack, gates: torch.Tensor, base_BTO: torch.Tensor | None, reuse_base: bool
) -> torch.Tensor:
    """Per token: ``h = Σ_e g_e √|s_e| A_e x`` from one stacked product, then ``Σ_e g_e … B_e h`` from another."""
    gates_a, gates_b = _signed_roots(stack, gates, x_BTD.dtype)
    position_Rr = torch.nn.functional.one_hot(stack.index.position_R, stack.max_rank).to(x_BTD.dtype)
    c_a = gates_a.index_select(-1, stack.index.adapter_R)
    c_b = gates_b.index_select(-1, stack.index.adapter_R)
    h_BTr = lowrank(x_BTD, stack.a_RD, position_Rr, c_a, None)
    return lowrank(h_BTr, position_Rr, stack.b_RO, c_b, base_BTO, reuse_base=reuse_base)
