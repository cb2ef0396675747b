"""Our side: the public ops, called as an engine calls them.

Up to ``EXAMPLES`` tokens are the rows of a decode step, ``x (T, D)``; more are one example, ``x (1, T, D)``, as
prompts and training batches are. So every call keeps the default promise: an example has the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from compose.kernels.grouped_lora.op import grouped_lora, plan_groups
from compose.kernels.mixture_lora.op import MixturePlan, mixture_lora
from compose.kernels.stack import LoraStack
from gpu.operands import Operands

Call = Callable[[], object]
EXAMPLES = 512


def in_place(operands: Operands, backend: str, **options: bool) -> Call:
    """A call that finds all it needs to know about the routing by itself; the result is written over ``base``."""
    stack, (x, base, ids, gates, indices) = operands.stack, _shaped(operands)
    if ids is not None:
        return lambda: grouped_lora(x, stack, ids, base=base, reuse_base=True, backend=backend, **options)
    assert gates is not None  # noqa: S101 - ids or gates are given
    return lambda: mixture_lora(x, stack, gates, indices, base=base, reuse_base=True, backend=backend, **options)


def planned(copies: Sequence[Operands], backend: str) -> list[Call]:
    """Calls that share one routing and one plan, as the layers of a model do under per-example adapters or gates."""
    _, _, ids, gates, indices = _shaped(copies[0])
    given = [(one.stack, *_shaped(one)[:2]) for one in copies]
    if ids is not None:
        groups = plan_groups(ids)
        return [
            lambda stack=stack, x=x, base=base: grouped_lora(
                x, stack, ids, base=base, plan=groups, reuse_base=True, backend=backend
            )
            for stack, x, base in given
        ]
    assert gates is not None  # noqa: S101 - ids or gates are given
    plan = MixturePlan()
    return [
        lambda stack=stack, x=x, base=base: mixture_lora(
            x, stack, gates, indices, base=base, plan=plan, reuse_base=True, backend=backend
        )
        for stack, x, base in given
    ]


def output(
    x_TD: torch.Tensor, stack: LoraStack, gates: torch.Tensor | None, operands: Operands, backend: str
) -> torch.Tensor:
    """Base plus update in new memory, ``(T, D)``, differentiable in x, the stack's factors and the gates."""
    _, base, ids, _, indices = _shaped(operands)
    x, gates = _example(x_TD, x_TD), _example(gates, x_TD)
    assert x is not None  # noqa: S101 - it is given
    if ids is not None:
        return grouped_lora(x, stack, ids, base=base, backend=backend).view(x_TD.shape)
    assert gates is not None  # noqa: S101 - ids or gates are given
    return mixture_lora(x, stack, gates, indices, base=base, backend=backend).view(x_TD.shape)


def _shaped(one: Operands) -> tuple[torch.Tensor, torch.Tensor, *tuple[torch.Tensor | None, ...]]:
    """x, base, ids, gates and indices of a call; many tokens are one example."""
    x, base = _example(one.x_TD, one.x_TD), _example(one.base_TD, one.x_TD)
    assert x is not None and base is not None  # noqa: S101, PT018 - they are given
    return x, base, *(_example(part, one.x_TD) for part in (one.ids_T, one.gates, one.indices_TK))


def _example(tensor: torch.Tensor | None, x_TD: torch.Tensor) -> torch.Tensor | None:
    return tensor[None] if tensor is not None and len(x_TD) > EXAMPLES else tensor
