"""Our side: the public ops, called as an engine calls them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compose.kernels.grouped_lora.op import grouped_lora, plan_groups
from compose.kernels.mixture_lora.op import MixturePlan, mixture_lora
from compose.kernels.stack import LoraStack
from gpu.operands import Operands

Call = Callable[[], object]


def in_place(operands: Operands, backend: str) -> Call:
    """A call that finds all it needs to know about the routing by itself; the result is written over ``base``."""
    x_TD, stack, base_TD, ids_T = operands.x_TD, operands.stack, operands.base_TD, operands.ids_T
    if ids_T is not None:
        return lambda: grouped_lora(x_TD, stack, ids_T, base=base_TD, reuse_base=True, backend=backend)
    gates, indices = operands.gates, operands.indices_TK
    assert gates is not None  # noqa: S101 - ids or gates are given
    return lambda: mixture_lora(x_TD, stack, gates, indices, base=base_TD, reuse_base=True, backend=backend)


def planned(copies: Sequence[Operands], backend: str) -> list[Call]:
    """Calls that share one routing and one plan, as the layers of a model do under per-example adapters or gates."""
    ids_T, gates, indices = copies[0].ids_T, copies[0].gates, copies[0].indices_TK
    if ids_T is not None:
        groups = plan_groups(ids_T)
        return [
            lambda one=one: grouped_lora(
                one.x_TD, one.stack, ids_T, base=one.base_TD, plan=groups, reuse_base=True, backend=backend
            )
            for one in copies
        ]
    assert gates is not None  # noqa: S101 - ids or gates are given
    plan = MixturePlan()
    return [
        lambda one=one: mixture_lora(
            one.x_TD, one.stack, gates, indices, base=one.base_TD, plan=plan, reuse_base=True, backend=backend
        )
        for one in copies
    ]


def output(
    x_TD: torch.Tensor, stack: LoraStack, gates: torch.Tensor | None, operands: Operands, backend: str
) -> torch.Tensor:
    """Base plus update in new memory, differentiable in x, the stack's factors and the gates."""
    if operands.ids_T is not None:
        return grouped_lora(x_TD, stack, operands.ids_T, base=operands.base_TD, backend=backend)
    assert gates is not None  # noqa: S101 - ids or gates are given
    return mixture_lora(x_TD, stack, gates, operands.indices_TK, base=operands.base_TD, backend=backend)
