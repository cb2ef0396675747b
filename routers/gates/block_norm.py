"""Gates that ask how much an expert makes of the input: SpectR, SMILE, LoGo.

Shape letters: ``D`` in, ``E`` experts, ``R`` rank rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.spectrum import spectral_rows, subspace_rows
from compose.routers.steps import GATES, Seen


@GATES.register("block_norm")
@dataclass(frozen=True, kw_only=True)
class BlockNormGate:
    """Scores ``|w_e x|`` with as many rows ``w_e`` as the expert has ranks; no output of an expert is formed.

    Rows are made from the factors when the router is built (of the site's first target, or of the tapped one), so they
    are not saved with it.

    Attributes:
        rows: ``"spectral"``: ``|S_e V_e^T x| = |B_e A_e x|`` (SpectR, arXiv:2504.03454; LoGo, 2511.07129);
            ``"subspace"``: ``|V_e^T x|``, how much of x lies in the directions the expert reads (SMILE, 2408.10174).
        rank: Keep that many of an expert's strongest directions; None: all.
        scaled: Whether the expert's scaling multiplies the score; it has no place in ``"subspace"``.
    """

    rows: Literal["spectral", "subspace"] = "spectral"
    rank: int | None = None
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.rows not in ("spectral", "subspace") or (self.rank is not None and self.rank < 1):
            raise IncompatibleError(
                f"rows must be spectral or subspace and rank at least 1 or None, got {self.rows!r}, {self.rank}"
            )
        if self.scaled and self.rows == "subspace":
            raise IncompatibleError("the directions of a subspace have no scaling; leave scaled out")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        stack = shape.read_stack
        if self.rows == "spectral":
            rows, experts = spectral_rows(stack, scaled=self.scaled, rank=self.rank)
        else:
            rows, experts = subspace_rows(stack, rank=self.rank)
        return _BlockNorm(rows, experts, shape.num_experts)


class _BlockNorm(nn.Module):
    rows_RD: torch.Tensor
    expert_R: torch.Tensor

    def __init__(self, rows_RD: torch.Tensor, expert_R: torch.Tensor, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.register_buffer("rows_RD", rows_RD, persistent=False)
        self.register_buffer("expert_R", expert_R, persistent=False)

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (..., D)`` -> scores ``(..., E)``."""
        assert seen.x is not None  # noqa: S101 - the specification demands an input for this gate
        h = nn.functional.linear(seen.x.to(self.rows_RD.dtype), self.rows_RD)
        squared = h.new_zeros(*h.shape[:-1], self.num_experts).index_add(-1, self.expert_R, h.square())
        return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()  # a root of 0 has no gradient
