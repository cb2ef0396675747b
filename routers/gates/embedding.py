"""An embedding of the task or cluster, and a linear map to scores: MOELoRA, MoCLE.

Shape letters: ``B`` rows, ``E`` experts, ``N`` tasks or clusters, ``D`` width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.linear import initial
from compose.routers.gates.rows import Numbered, number_known, rows_of_table
from compose.routers.steps import GATES, Seen


@GATES.register("embedding")
@dataclass(frozen=True, kw_only=True)
class EmbeddingGate:
    """Scores ``W v_n (+ b)`` of the learned vector of a task or cluster (arXiv:2310.18339, arXiv:2312.12379).

    An unknown number (-1) reads the mean vector. Embeddings start from N(0, 1), the linear map as ``nn.Linear``.

    Attributes:
        of: ``"tasks"`` or ``"clusters"``.
        width: Of the embedding.
        bias: Whether the linear map has a bias (0 at the start).
    """

    of: Numbered = "tasks"
    width: int = 64
    bias: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.of not in ("tasks", "clusters"):
            raise IncompatibleError(
                f"width must be at least 1 and of tasks or clusters, got {self.width}, {self.of!r}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        table_ND = torch.randn(number_known(self.of, shape), self.width, generator=shape.generator)
        weight_ED = initial("kaiming", shape.num_experts, self.width, 0.0, shape.generator)
        return _Embedding(table_ND, weight_ED, torch.zeros(shape.num_experts) if self.bias else None, self.of)


class _Embedding(nn.Module):
    def __init__(
        self, table_ND: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, of: Numbered
    ) -> None:
        super().__init__()
        self.table_ND = nn.Parameter(table_ND)
        self.weight_ED = nn.Parameter(weight_ED)
        self.bias_E = None if bias_E is None else nn.Parameter(bias_E)
        self.of = of

    def forward(self, seen: Seen) -> torch.Tensor:
        """Logits ``(B, E)``."""
        rows_BD = rows_of_table(self.table_ND, seen.ids, self.of)
        return nn.functional.linear(rows_BD, self.weight_ED, self.bias_E)
