"""The same computation by what torch carries: each maker returns a call that adds the update to ``base`` in place.

What depends neither on x nor on a router's output is made once, outside the timed call; that favours the baselines.
Shape letters: ``T`` tokens, ``E`` adapters, ``K`` chosen per token, ``M`` pairs ``T K``, ``R`` rank rows, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from gpu.cases import Case
from gpu.operands import SCALING, Operands

Call = Callable[[], object]
_GATHERED_BYTES = 8 << 30


@dataclass(frozen=True)
class Baseline:
    """A way to compute a case.

    Attributes:
        name: Its column.
        refuses: Returns why a case cannot be run so, or None.
        make: Turns one copy of the operands into a call.
        launches: About how many kernels a call of a case launches; limits how many calls one graph holds.
    """

    name: str
    refuses: Callable[[Case], str | None]
    make: Callable[[Operands], Call]
    launches: Callable[[Case], int]


def stacked(operands: Operands) -> Call:
    """All rank rows of the stack in two products (cuBLAS), the coefficients multiplied in between."""
    x_TD, base_TD, stack = operands.x_TD, operands.base_TD, operands.stack
    given = operands.coefficients() if operands.gates is None else None

    def call() -> torch.Tensor:
        h_TR = x_TD @ stack.a_RD.T
        coefficients_TE = operands.coefficients() if given is None else given
        return base_TD.addmm_(spread(h_TR, coefficients_TE, stack.ranks), stack.b_RO, alpha=SCALING)

    if given is not None and len(set(stack.ranks)) > 1:
        rows_TR = given.index_select(1, stack.index.adapter_R)
        return lambda: base_TD.addmm_((x_TD @ stack.a_RD.T).mul_(rows_TR), stack.b_RO, alpha=SCALING)
    return call


def spread(h_TR: torch.Tensor, coefficients_TE: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """Multiply the rank rows of every adapter by its coefficient; one kernel, since ranks are equal."""
    return (h_TR.unflatten(1, (len(ranks), ranks[0])) * coefficients_TE[:, :, None]).flatten(1)


def gather_bmm(operands: Operands) -> Call:
    """The factors of every token's adapter copied out, then two batched products."""
    x_TD, base_TD, stack, ids_T = operands.x_TD, operands.base_TD, operands.stack, operands.ids_T
    assert ids_T is not None  # noqa: S101 - refused otherwise
    a_ErD, b_ErD = (part.unflatten(0, (stack.num_adapters, -1)) for part in (stack.a_RD, stack.b_RO))

    def call() -> torch.Tensor:
        h_T1r = torch.bmm(x_TD[:, None], a_ErD.index_select(0, ids_T).transpose(1, 2))
        return base_TD[:, None].baddbmm_(h_T1r, b_ErD.index_select(0, ids_T), alpha=SCALING)

    return call


def grouped(operands: Operands) -> Call:
    """Pairs of token and adapter sorted by adapter, two ``grouped_mm``, and back; sorting is part of the call."""
    x_TD, base_TD, stack = operands.x_TD, operands.base_TD, operands.stack
    a_ErD, b_ErD = (part.unflatten(0, (stack.num_adapters, -1)) for part in (stack.a_RD, stack.b_RO))

    def call() -> torch.Tensor:
        return base_TD.add_(grouped_update(x_TD, a_ErD, b_ErD, operands, operands.gates))

    return call


def grouped_update(
    x_TD: torch.Tensor,
    a_ErD: torch.Tensor,
    b_ErD: torch.Tensor,
    operands: Operands,
    gates_TK: torch.Tensor | None,
) -> torch.Tensor:
    """Return the update alone, differentiable in all four tensors."""
    chosen_TK = operands.ids_T[:, None] if operands.indices_TK is None else operands.indices_TK  # type: ignore[index]
    top = chosen_TK.shape[1]
    sorted_M, order_M = chosen_TK.flatten().sort()
    adapters = torch.arange(operands.stack.num_adapters, device=x_TD.device)
    ends_E = torch.searchsorted(sorted_M, adapters, right=True, out_int32=True)
    inverse_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=x_TD.device))
    h_Mr = F.grouped_mm(x_TD.index_select(0, order_M // top), a_ErD.transpose(1, 2), offs=ends_E)
    weights = h_Mr.new_full((1, 1), SCALING) if gates_TK is None else _weights(gates_TK, order_M)
    y_MD = F.grouped_mm(h_Mr * weights, b_ErD, offs=ends_E).index_select(0, inverse_M)
    return y_MD if top == 1 else y_MD.unflatten(0, (-1, top)).sum(1)


def _weights(gates_TK: torch.Tensor, order_M: torch.Tensor) -> torch.Tensor:
    return gates_TK.flatten().index_select(0, order_M)[:, None] * SCALING


def loop(operands: Operands) -> Call:
    """One adapter after the other, as PEFT (ids), X-LoRA (dense gates) and plain mixtures of experts do it."""
    tokens = tokens_of_adapters(operands)
    stack, base_TD = operands.stack, operands.base_TD

    def call() -> torch.Tensor:
        for adapter in range(stack.num_adapters):
            a_rD, b_rD = stack.factors(adapter)
            add_adapter(base_TD, operands.x_TD, a_rD, b_rD, tokens[adapter], _gate(operands.gates, adapter, tokens))
        return base_TD

    return call


Chosen = tuple[torch.Tensor, torch.Tensor]  # tokens of an adapter, and which of their K choices it is


def tokens_of_adapters(operands: Operands) -> list[Chosen | None]:
    """Return what each adapter works on, found once; None where gates are dense and every adapter sees every token."""
    if operands.gates is not None and operands.indices_TK is None:
        return [None] * operands.stack.num_adapters
    chosen_TK = operands.ids_T[:, None] if operands.indices_TK is None else operands.indices_TK  # type: ignore[index]
    return [(chosen_TK == adapter).nonzero(as_tuple=True) for adapter in range(operands.stack.num_adapters)]


def _gate(gates: torch.Tensor | None, adapter: int, tokens: list[Chosen | None]) -> torch.Tensor | None:
    """The gates of one adapter's tokens, as a column."""
    if gates is None:
        return None
    own = tokens[adapter]
    return gates[:, adapter, None] if own is None else gates[own][:, None]


def add_adapter(
    y_TD: torch.Tensor,
    x_TD: torch.Tensor,
    a_rD: torch.Tensor,
    b_rD: torch.Tensor,
    tokens: Chosen | None,
    gate: torch.Tensor | None,
) -> None:
    """Add one adapter's update to the rows of ``y_TD`` it works on, in place."""
    rows = None if tokens is None else tokens[0]
    update = F.linear(F.linear(x_TD if rows is None else x_TD[rows], a_rD), b_rD.T) * SCALING
    update = update if gate is None else update * gate
    if rows is None:
        y_TD += update
    else:
        y_TD[rows] += update


def _gather_refuses(case: Case) -> str | None:
    if case.routing != "ids" or not case.uniform:
        return "one adapter of one rank per token only"
    gathered = case.tokens * case.ranks[0] * case.width * 2 * 2
    return f"would gather {gathered >> 30} GiB" if gathered > _GATHERED_BYTES else None


def _grouped_refuses(case: Case) -> str | None:
    return "ids or top-k of one rank only" if case.routing == "dense" or not case.uniform else None


def _stacked_refuses(case: Case) -> str | None:
    return "gates over mixed ranks" if case.routing != "ids" and not case.uniform else None


BASELINES = (
    Baseline("stacked", _stacked_refuses, stacked, lambda case: 5),
    Baseline("gather_bmm", _gather_refuses, gather_bmm, lambda case: 4),
    Baseline("grouped_mm", _grouped_refuses, grouped, lambda case: 16),
    Baseline("loop", lambda case: None, loop, lambda case: 6 * case.adapters),
)
