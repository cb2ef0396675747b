"""Rows of a learned table by task or cluster number; an unknown number (-1) reads the mean of all rows.

Shape letters: ``B`` rows of the batch, ``N`` numbers known, ``D`` width.
"""

from __future__ import annotations

from typing import Literal

import torch

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape

Numbered = Literal["tasks", "clusters"]


def number_known(of: Numbered, shape: SiteShape) -> int:
    """How many tasks or clusters there are.

    Raises:
        IncompatibleError: None are known, or no such kind.
    """
    if of not in ("tasks", "clusters"):
        raise IncompatibleError(f"a table has rows of tasks or of clusters, got {of!r}")
    known = shape.num_tasks if of == "tasks" else shape.num_clusters
    if known < 1:
        raise IncompatibleError(f"a table with one row for each of the {of} needs build(..., {of}=...)")
    return known


def rows_of_table(table_ND: torch.Tensor, ids_B: torch.Tensor | None, of: Numbered) -> torch.Tensor:
    """Return ``(B, D)``.

    Raises:
        IncompatibleError: No numbers, or one beyond the table (checked on the CPU while nothing is traced).
    """
    if ids_B is None:
        raise IncompatibleError(f"this gate has one row for each of the {of}; gate_input must say their numbers")
    if ids_B.device.type == "cpu" and not torch.compiler.is_compiling() and ids_B.numel():
        lowest, highest = int(ids_B.min()), int(ids_B.max())
        if lowest < -1 or highest >= len(table_ND):
            raise IncompatibleError(
                f"numbers of {of} must lie in [0, {len(table_ND)}), or be -1 for an unknown one; "
                f"got {lowest} to {highest}"
            )
    ids_B = ids_B.to(table_ND.device)
    known = table_ND[ids_B.clamp(min=0)]
    return torch.where((ids_B < 0)[:, None], table_ND.mean(0), known)
