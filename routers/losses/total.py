"""The sum of a mixture's auxiliary losses over its sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from compose.errors import UnknownNameError
from compose.routers.losses.registry import LOSSES, AuxLoss, WorldSum
from compose.routers.routing import Decisions


class TotalLoss(NamedTuple):
    """What is added to the model's loss, and its parts.

    Attributes:
        total: ``Σ coefficient · value``, a scalar.
        parts: Name -> value before the coefficient, detached. A name's second entry is called ``name_2``.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


def total_loss(
    losses: Sequence[AuxLoss], decisions: Sequence[Decisions], world_sum: WorldSum | None = None
) -> TotalLoss:
    """Sum losses over sites.

    A loss's value is the mean over sites, so that its weight does not grow with depth, or their sum (``reduce``).

    Args:
        losses: Of the mixture.
        decisions: One entry per site; none give a total of 0 without a graph.
        world_sum: Adds up a vector over processes; default: `over_processes`.
    """
    add = over_processes if world_sum is None else world_sum
    device = decisions[0].gates_NE.device if decisions else None
    total = torch.zeros((), device=device)
    parts: dict[str, torch.Tensor] = {}
    for loss in losses:
        values = [loss(of_site, add).to(total.device) for of_site in decisions]
        value = torch.stack(values).sum() if values else total.new_zeros(())
        if loss.reduce == "mean":
            value = value / max(1, len(values))
        total = total + loss.coefficient * value
        parts[_free_name(name_of(loss), parts)] = value.detach()
    return TotalLoss(total, parts)


def over_processes(counts: torch.Tensor) -> torch.Tensor:
    """Add up a vector over the processes of a distributed run; the vector itself where there is one process."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return counts
    summed = counts.clone()
    distributed.all_reduce(summed)
    return summed


def name_of(loss: AuxLoss) -> str:
    """The name a loss is registered under.

    Raises:
        UnknownNameError: It is not registered.
    """
    for name in LOSSES:
        if LOSSES[name] is type(loss):
            return name
    raise UnknownNameError(f"{type(loss).__name__} is not a registered {LOSSES.kind}")


def _free_name(name: str, taken: dict[str, torch.Tensor]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
