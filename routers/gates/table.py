"""Gates that read nothing but a number: one learned or given score per expert, for all inputs or per task or cluster.

Shape letters: ``B`` rows, ``E`` experts, ``N`` tasks or clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.rows import Numbered, number_known, rows_of_table
from compose.routers.steps import GATES, Seen


@GATES.register("table")
@dataclass(frozen=True, kw_only=True)
class TableGate:
    """Scores from a table: linear fusion, MultiLoRA (arXiv:2311.11501), Poly (arXiv:2202.13914).

    An unknown task or cluster (number -1) reads the mean of all rows.

    Attributes:
        rows: ``"one"``: the same scores for all inputs (``gate_input="none"``); ``"tasks"`` or ``"clusters"``: a row
            each.
        init: ``"zeros"``; or ``"uniform"`` in ``±bound``.
        bound: Of ``"uniform"``.
        values: Scores at the start, one per expert in the bank's order, for every row; replaces ``init``. With
            ``train="none"`` they are the weights of a fixed fusion.
    """

    rows: Literal["one", "tasks", "clusters"] = "one"
    init: Literal["zeros", "uniform"] = "zeros"
    bound: float = 1e-3
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rows not in ("one", "tasks", "clusters") or self.init not in ("zeros", "uniform") or self.bound < 0:
            raise IncompatibleError(
                "a table has rows one, tasks or clusters, init zeros or uniform and bound >= 0; "
                f"got {self.rows!r}, {self.init!r}, {self.bound}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        count = 1 if self.rows == "one" else number_known(self.rows, shape)
        if self.values and len(self.values) != shape.num_experts:
            raise IncompatibleError(f"the table has {len(self.values)} values, the bank {shape.num_experts} experts")
        if self.values:
            table_NE = torch.tensor([self.values] * count, dtype=torch.float32)
        elif self.init == "uniform":
            table_NE = (torch.rand(count, shape.num_experts, generator=shape.generator) * 2 - 1) * self.bound
        else:
            table_NE = torch.zeros(count, shape.num_experts)
        return _Table(table_NE, None if self.rows == "one" else self.rows)


class _Table(nn.Module):
    def __init__(self, table_NE: torch.Tensor, of: Numbered | None) -> None:
        super().__init__()
        self.table_NE = nn.Parameter(table_NE)
        self.of = of

    def forward(self, seen: Seen) -> torch.Tensor:
        """Logits ``(E,)``, or ``(B, E)`` by number."""
        return self.table_NE[0] if self.of is None else rows_of_table(self.table_NE, seen.ids, self.of)
