"""What every row of a batch asked for, as one selection: an adapter, a weighted set of adapters, or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch

from compose.bank import Bank
from compose.engine.coefficients import AdapterIds, Coefficients, Combine, Selection
from compose.errors import IncompatibleError

RowAdapter = str | Mapping[str, float] | None
"""One row's wish: an adapter's name, ``{name: weight}``, or ``None`` for the bare base model."""

RowWeights = tuple[tuple[int, float], ...]
"""The same against a bank: ``(index, weight)`` of every adapter whose weight is not zero."""


def row_weights(bank: Bank, adapter: RowAdapter) -> RowWeights:
    """Return what ``adapter`` means against ``bank``.

    Raises:
        UnknownNameError: A name is not in the bank.
        IncompatibleError: A weight is no finite number, or ``adapter`` is of another kind.
    """
    if adapter is None:
        return ()
    if isinstance(adapter, str):
        return ((bank.index(adapter), 1.0),)
    if not isinstance(adapter, Mapping):
        raise IncompatibleError(
            f"a row takes an adapter's name, a mapping of names to weights, or None; got {type(adapter).__name__}"
        )
    weights = [(bank.index(name), _weight(name, weight)) for name, weight in adapter.items()]
    return tuple((index, weight) for index, weight in weights if weight)


def rows_selection(rows: Sequence[RowWeights], *, combine: Combine, device: torch.device) -> Selection | None:
    """Return one selection for ``B`` rows.

    Rows with at most one adapter, at weight 1, become ``AdapterIds (B,)``; any other batch becomes sparse
    ``Coefficients`` of ``values`` and ``indices (B, K)``, ``K`` the most adapters that one row has. Rows without any
    adapter need no selection: ``None``.
    """
    if not any(rows):
        return None
    if all(len(row) == 0 or (len(row) == 1 and row[0][1] == 1.0) for row in rows):
        return AdapterIds(torch.tensor([row[0][0] if row else -1 for row in rows], device=device))
    width = max(len(row) for row in rows)
    indices = [[index for index, _ in row] + [-1] * (width - len(row)) for row in rows]
    values = [[weight for _, weight in row] + [0.0] * (width - len(row)) for row in rows]
    return Coefficients(
        torch.tensor(values, dtype=torch.float32, device=device), combine, indices=torch.tensor(indices, device=device)
    )


def _weight(name: str, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise IncompatibleError(f"the weight of {name!r} must be a finite number, got {weight!r}")
    return float(weight)
