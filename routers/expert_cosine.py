"""Pairwise cosines of the experts' deltas ``s_e B_e A_e``, from Gram matrices of their factors.

``<B_i A_i, B_j A_j> = Σ (A_i A_jᵀ) ∘ (B_iᵀ B_j)``: no delta is formed.

Shape letters: ``E`` experts, ``R`` rank rows of all experts together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack


def delta_products(stack: LoraStack) -> torch.Tensor:
    """Inner products of all pairs of deltas of one target, ``(E, E)`` float64 on the CPU, scalings included."""
    a_RD, b_RO = stack.a_RD.detach().double(), stack.b_RO.detach().double()
    rows_RR = (a_RD @ a_RD.T) * (b_RO @ b_RO.T)
    owner_RE = torch.nn.functional.one_hot(stack.index.adapter_R, stack.num_adapters).double()
    scaling_E = stack.scaling_E.detach().double()
    products_EE = owner_RE.T @ rows_RR @ owner_RE
    return (scaling_E[:, None] * products_EE * scaling_E).cpu()


def expert_cosines(stacks: Iterable[LoraStack]) -> torch.Tensor:
    """Cosines of the experts, each the deltas of all given targets as one vector.

    Args:
        stacks: One per target, over the same experts.

    Returns:
        ``(E, E)`` float64; NaN for experts that are zero.

    Raises:
        IncompatibleError: No target.
    """
    products = [delta_products(stack) for stack in stacks]
    if not products:
        raise IncompatibleError("there are no targets whose experts could be compared")
    total_EE = torch.stack(products).sum(0)
    length_E = total_EE.diagonal().clamp_min(0).sqrt()
    cosines_EE = total_EE / (length_E[:, None] * length_E)
    nothing_E = length_E == 0
    cosines_EE[nothing_E[:, None] | nothing_E] = torch.nan
    return cosines_EE.clamp(-1, 1)
