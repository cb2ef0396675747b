"""Selections in two numberings: the bank's, which callers use, and that of the slots, which layers apply.

Shape letters: ``E`` adapters of the bank, ``K`` named per row, ``G`` groups of targets.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compose.engine.coefficients import AdapterIds, Coefficients
from compose.errors import IncompatibleError

Numbered = Coefficients | AdapterIds
"""Selections that name their adapters before the model runs; a router's gates do not."""


def versions(selection: Numbered) -> tuple[int, ...] | None:
    """Write counters of the tensors that say which adapters are used; ``None`` where a change could go unseen."""
    if isinstance(selection, AdapterIds):
        tensors = [selection.ids]
    elif selection.indices is not None:
        tensors = [selection.indices]
    else:
        tensors = [selection.values]
    return None if any(one.is_inference() for one in tensors) else tuple(one._version for one in tensors)


def named(selection: Numbered) -> list[int]:
    """Numbers of the adapters that ``selection`` names, ascending."""
    if isinstance(selection, AdapterIds):
        found = selection.ids
    elif selection.indices is not None:
        found = selection.indices
    else:
        if selection.values.requires_grad:
            raise IncompatibleError(
                "trained coefficients of a paged bank must be sparse, for any adapter could come to have one: "
                "give Coefficients with indices"
            )
        found = (selection.values != 0).reshape(-1, selection.values.shape[-1]).any(0).nonzero()
    return [number for number in found.unique().tolist() if number >= 0]


def translated(selection: Numbered, slots: Mapping[int, int], num_adapters: int) -> Numbered | None:
    """Return ``selection`` with the numbers of adapters replaced by those of their slots."""
    if not slots:
        return None
    table = torch.full((num_adapters + 1,), -1)
    table[list(slots)] = torch.tensor(list(slots.values()))
    if isinstance(selection, AdapterIds):
        return AdapterIds(_look_up(table, selection.ids))
    values, indices = selection.values, selection.indices
    if indices is None:
        values, indices = _sparse(values, grouped=selection.groups is not None)
    return Coefficients(values, selection.combine, selection.groups, _look_up(table, indices))


def _look_up(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """``table`` has -1 at its end, where -1 points."""
    return table.to(numbers.device)[numbers]


def _sparse(values: torch.Tensor, *, grouped: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values ``(..., K)`` and indices of the same shape without ``G`` for dense values ``(..., E)``.

    Per row or token the adapters that some group uses, in the bank's order, then others, whose values are 0.
    """
    used = (values != 0).any(0) if grouped else values != 0
    most = max(1, int(used.sum(-1).max())) if used.numel() else 1
    indices = used.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return values.gather(-1, indices.expand(*values.shape[:-1], most)), indices
