"""The processes of a training run (``torchrun``), and one where there is one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import distributed


class Processes(NamedTuple):
    """This process among the others.

    Attributes:
        rank: From 0.
        world: How many there are.
    """

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0


def processes() -> Processes:
    """Return this process's place in the default group; alone where none was initialised."""
    if not distributed.is_available() or not distributed.is_initialized():
        return Processes(0, 1)
    return Processes(distributed.get_rank(), distributed.get_world_size())


def sum_(tensors: Iterable[torch.Tensor]) -> None:
    """Add up tensors over processes, in place, in one message per dtype; every process gives the same shapes."""
    if processes().world == 1:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        distributed.all_reduce(flat)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def share_(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if processes().world > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def wait() -> None:
    """Return when every process has come here."""
    if processes().world > 1:
        distributed.barrier()
