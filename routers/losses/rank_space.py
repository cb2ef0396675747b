"""Experts' outputs compared in rank space: dot products through Gram matrices, never a vector per decision and expert.

``<B_e A_e x, B_f A_f y> = h_e(x)ᵀ (B_eᵀ B_f) h_f(y)``: with the factors stacked, ``B_eᵀ B_f`` are blocks of one
``(R, R)`` matrix. Shape letters: ``N`` decisions, ``S`` sampled ones, ``E`` experts, ``R`` rank rows, ``M`` items.
"""

from __future__ import annotations

import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.losses.means import at_least_float32
from compose.routers.routing import Decisions


def inputs_of(decisions: Decisions, loss: str) -> tuple[torch.Tensor, LoraStack]:
    """The inputs and factors a loss reads.

    Raises:
        IncompatibleError: They were not kept, or the factors are of another number of experts.
    """
    if decisions.x_ND is None or decisions.stack is None:
        raise IncompatibleError(
            f"{loss} at {decisions.site} reads the layer's inputs and factors, which were not kept; "
            "record decisions with inputs=True"
        )
    if decisions.stack.num_adapters != decisions.gates_NE.shape[1]:
        raise IncompatibleError(
            f"{loss} at {decisions.site}: {decisions.gates_NE.shape[1]} gates, but factors of "
            f"{decisions.stack.num_adapters} adapters"
        )
    return decisions.x_ND, decisions.stack


def sample(mask: torch.Tensor, limit: int) -> torch.Tensor:
    """int64: at most ``limit`` places of a flat mask, evenly spread; the same for the same mask."""
    places = mask.nonzero().squeeze(-1)
    count = places.shape[0]
    if count <= limit:
        return places
    return places[torch.arange(limit, device=places.device) * count // limit]


def activations(x_ND: torch.Tensor, stack: LoraStack) -> torch.Tensor:
    """``h (S, R) = s A x`` in float32 or better."""
    h_SR = at_least_float32(x_ND) @ at_least_float32(stack.a_RD).T
    return h_SR * stack.scaling_E.to(h_SR.dtype)[stack.index.adapter_R]


def gram(factor_RC: torch.Tensor) -> torch.Tensor:
    """``(R, R)`` dot products of rank rows, in float32 or better."""
    rows = at_least_float32(factor_RC)
    return rows @ rows.T


def owners(stack: LoraStack, dtype: torch.dtype) -> torch.Tensor:
    """``(E, R)``: 1 where an adapter owns a rank row."""
    experts = torch.arange(stack.num_adapters, device=stack.a_RD.device)
    return (experts[:, None] == stack.index.adapter_R).to(dtype)


def cosines(dots: torch.Tensor) -> torch.Tensor:
    """``(..., M, M)`` dot products -> cosines; 0 for items shorter than 1e-6."""
    squares = dots.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
    lengths = squares.sqrt()
    return dots / (lengths[..., :, None] * lengths[..., None, :])
