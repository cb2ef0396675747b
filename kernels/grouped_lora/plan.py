"""GroupPlan: what a backend wants to know about adapter ids, found once on the host and used by every layer.

Shape letters: ``N`` entries of ids (batch rows, or tokens), ``U`` distinct adapters among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """Ids grouped by adapter.

    Attributes:
        ids: The ids this plan was made from.
        distinct: The ``U`` adapters that occur, ascending, without -1.
        bounds: ``U + 1`` positions in ``order``: entries of adapter ``distinct[u]`` are ``bounds[u]:bounds[u + 1]``;
            entries before ``bounds[0]`` have no adapter.
        order: ``(N,)`` int64: entries sorted by id, equal ids in their first order.
        inverse: ``(N,)`` int64: where each entry lies in ``order``.
        lowest: Smallest id, -1 for empty ids.
        highest: Largest id, -1 for empty ids.
        gathered: Per stack, factors a backend gathered for these ids; held as long as plan and stack live.
        layouts: Index tensors a backend made for these ids, by the stack's ranks: shared by all stacks of these ranks,
            and only those of the last number of tokens.
        tables: Tokens sorted by adapter on the device, by the number of adapters and tokens per tile (Triton).
    """

    ids: torch.Tensor
    distinct: tuple[int, ...]
    bounds: tuple[int, ...]
    order: torch.Tensor
    inverse: torch.Tensor
    lowest: int
    highest: int
    gathered: WeakKeyDictionary[LoraStack, Any] = field(default_factory=WeakKeyDictionary, repr=False)
    layouts: dict[Any, Any] = field(default_factory=dict, repr=False)
    tables: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)

    @property
    def single(self) -> int | None:
        """The one adapter every entry has, if there is one; -1 when no entry has any."""
        if not self.distinct:
            return -1
        return self.distinct[0] if len(self.distinct) == 1 and self.bounds[0] == 0 else None


def plan_groups(ids: torch.Tensor) -> GroupPlan:
    """Group ids by adapter; costs one copy to the host, so make it once per batch and pass it to every layer.

    Args:
        ids: int64 ``(B,)`` or ``(B, T)``; -1 = no adapter. Later changes to ``ids`` do not reach the plan.

    Raises:
        IncompatibleError: Wrong dtype or shape, or an id below -1.
    """
    check_ids(ids)
    flat = ids.detach().reshape(-1).cpu()
    sorted_ids, order = flat.sort(stable=True)
    values, counts = sorted_ids.unique_consecutive(return_counts=True)
    distinct, sizes = values.tolist(), counts.tolist()
    lowest, highest = (distinct[0], distinct[-1]) if distinct else (-1, -1)
    if lowest < -1:
        raise IncompatibleError(f"plan_groups: adapter id {lowest} is out of range; use -1 for no adapter")
    bounds = [0]
    if lowest == -1 and distinct:
        bounds = [sizes[0]]
        distinct, sizes = distinct[1:], sizes[1:]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    device = ids.device
    return GroupPlan(
        ids.detach().clone(), tuple(distinct), tuple(bounds), order.to(device), inverse.to(device), lowest, highest
    )


def check_ids(ids: torch.Tensor) -> None:
    """Refuse ids that are not int64 ``(B,)`` or ``(B, T)``.

    Raises:
        IncompatibleError: With the dtype and shape given.
    """
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2):
        raise IncompatibleError(f"ids must be int64 (B,) or (B, T), got {ids.dtype} {tuple(ids.shape)}")
