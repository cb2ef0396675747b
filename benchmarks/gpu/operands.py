"""Inputs of a case: random, rounded to the dtype, and as many copies as it takes to keep weights cold.

Shape letters: ``T`` tokens, ``E`` adapters, ``K`` chosen per token, ``R`` rank rows of all adapters, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compose.kernels.stack import LoraStack, RowIndex
from gpu.cases import Case

SCALING = 2.0
_MOST_COPIES = 512


@dataclass(frozen=True)
class Operands:
    """One copy of everything a call touches.

    Attributes:
        x_TD: Inputs.
        stack: Factors, all of scaling ``SCALING``.
        base_TD: What the result is added to, in place where nothing is differentiated.
        ids_T: One adapter per token, else None.
        gates: ``(T, E)`` or ``(T, K)`` in the dtype of ``x_TD``, else None.
        indices_TK: Adapters of top-k gates, else None.
    """

    x_TD: torch.Tensor
    stack: LoraStack
    base_TD: torch.Tensor
    ids_T: torch.Tensor | None = None
    gates: torch.Tensor | None = None
    indices_TK: torch.Tensor | None = None

    def coefficients(self) -> torch.Tensor:
        """Gates of all adapters, scaling left out; rows of 0 and 1 for ids."""
        like = self.x_TD if self.gates is None else self.gates
        if self.gates is not None and self.indices_TK is None:
            return self.gates
        empty = like.new_zeros(len(self.x_TD), self.stack.num_adapters)
        if self.gates is not None and self.indices_TK is not None:
            return empty.scatter_add(1, self.indices_TK, self.gates)
        assert self.ids_T is not None  # noqa: S101 - one of the three is given
        return empty.scatter(1, self.ids_T[:, None], 1.0)

    @property
    def bytes_read(self) -> int:
        """Bytes any implementation has to read: x, base, routing, and the factors of adapters that occur."""
        chosen = self.ids_T if self.ids_T is not None else self.indices_TK
        live = range(self.stack.num_adapters) if chosen is None else chosen.unique().tolist()
        rows = sum(self.stack.ranks[adapter] for adapter in live)
        factors = rows * 2 * self.x_TD.shape[1] * self.x_TD.element_size()
        routing = (self.ids_T, self.gates, self.indices_TK)
        return factors + sum(_size(one) for one in (self.x_TD, self.base_TD, *routing) if one is not None)

    @property
    def bytes_written(self) -> int:
        """Bytes of the result."""
        return _size(self.base_TD)


def make_operands(case: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Operands:
    """Return one copy of a case's inputs; entries of x, base and the update are of about unit size."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

    rows = sum(case.ranks)
    rank = max(case.ranks)
    scaling_E = torch.full((case.adapters,), SCALING, device=device)
    a_RD, b_RD = normal(rows, case.width, scale=case.width**-0.5), normal(rows, case.width, scale=0.5 * rank**-0.5)
    stack = LoraStack(a_RD, b_RD, scaling_E, case.ranks)
    x_TD, base_TD = normal(case.tokens, case.width), normal(case.tokens, case.width)
    if case.routing == "ids":
        ids_T = torch.arange(case.tokens, device=device) * case.adapters // case.tokens if case.runs else None
        if ids_T is None:
            order = torch.randperm(case.tokens, device=device, generator=generator)
            ids_T = order % case.adapters
        return Operands(x_TD, stack, base_TD, ids_T=ids_T)
    scores_TE = torch.randn(case.tokens, case.adapters, device=device, generator=generator)
    if case.routing == "dense":
        return Operands(x_TD, stack, base_TD, gates=scores_TE.softmax(-1).to(dtype))
    values_TK, indices_TK = scores_TE.topk(case.top)
    return Operands(x_TD, stack, base_TD, gates=values_TK.softmax(-1).to(dtype), indices_TK=indices_TK)


def padded(operands: Operands) -> Operands:
    """Return the operands with every adapter padded with zero rows to the largest rank."""
    old, rank = operands.stack, operands.stack.max_rank
    a, b = (old.a_RD.new_zeros(old.num_adapters, rank, operands.x_TD.shape[1]) for _ in range(2))
    for adapter, live in enumerate(old.ranks):
        a[adapter, :live], b[adapter, :live] = old.factors(adapter)
    stack = LoraStack(a.flatten(0, 1), b.flatten(0, 1), old.scaling_E, (rank,) * old.num_adapters)
    return Operands(operands.x_TD, stack, operands.base_TD, operands.ids_T, operands.gates, operands.indices_TK)


def cold_copies(first: Operands, l2_bytes: int) -> list[Operands]:
    """Return so many copies, in memory of their own, that a round through them passes twice the L2 cache.

    At least 2, at most ``_MOST_COPIES``. Every copy has its own row index too, as the layers of a model do.
    """
    count = -(-2 * l2_bytes // first.bytes_read) + 1
    return [first, *(_copied(first) for _ in range(max(2, min(count, _MOST_COPIES)) - 1))]


def _copied(one: Operands) -> Operands:
    old = one.stack
    index = RowIndex(*(tensor.clone() for tensor in old.index))
    stack = LoraStack(old.a_RD.clone(), old.b_RO.clone(), old.scaling_E.clone(), old.ranks, index)
    routing = (None if tensor is None else tensor.clone() for tensor in (one.ids_T, one.gates, one.indices_TK))
    return Operands(one.x_TD.clone(), stack, one.base_TD.clone(), *routing)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
