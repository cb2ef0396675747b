"""Masked means over the decisions of all processes, whose gradients average to those of the whole batch.

Shape letters: ``N`` decisions, ``E`` experts, ``C`` columns, ``B`` rows.
"""

from __future__ import annotations

import torch

from compose.routers.losses.registry import Over, WorldSum
from compose.routers.routing import Decisions


def counted(decisions: Decisions, over: Over) -> torch.Tensor:
    """The decisions a loss is about: bool ``(N,)``."""
    return decisions.real_N if over == "real" else decisions.response_N & decisions.real_N


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """The values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def of_available(values_NE: torch.Tensor, decisions: Decisions) -> torch.Tensor:
    """``(N, E)`` in float32 or better, 0 for experts that the site lacks."""
    return torch.where(decisions.available_E, at_least_float32(values_NE), 0)


def chosen(decisions: Decisions) -> torch.Tensor:
    """Available experts whose gate is not 0: bool ``(N, E)``."""
    return (decisions.gates_NE != 0) & decisions.available_E


def number_available(decisions: Decisions) -> int:
    """``E``: how many experts the site has."""
    return int(decisions.available_E.sum())


def rows_of(decisions: Decisions) -> torch.Tensor:
    """int64 ``(N,)``: the row of the batch each decision belongs to; its own where nobody said."""
    if decisions.rows_N is not None:
        return decisions.rows_N
    return torch.arange(decisions.real_N.shape[0], device=decisions.real_N.device)


def world_mean(
    values_NC: torch.Tensor, weights_N: torch.Tensor, world_sum: WorldSum
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means of columns over all processes.

    The value is the same in every process. The gradient is that of this process's part, times the number of
    processes: averaged over processes, as distributed training does, it is the gradient of the mean.

    Args:
        values_NC: float32 or float64; lines of weight 0 may hold anything.
        weights_N: bool, or numbers >= 0 without gradient.
        world_sum: Adds up a vector over processes; called exactly once.

    Returns:
        Means ``(C,)``, 0 where nothing has weight, and the sum of the weights of all processes, a scalar.
    """
    weights = weights_N.to(values_NC.dtype)[:, None]
    sums = torch.where(weights > 0, values_NC * weights, 0).sum(0)
    tail = torch.stack([weights.sum(), weights.new_ones(())])
    world = world_sum(torch.cat([sums.detach(), tail]))
    total, processes = world[-2], world[-1]
    return (world[:-2] + processes * (sums - sums.detach())) / torch.where(total > 0, total, 1), total
