"""LoraStack: the factors of all adapters of one target, concatenated rank row by rank row.

Shape letters: ``E`` adapters, ``R`` rank rows of all adapters together, ``D`` input width, ``O`` output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from compose.errors import IncompatibleError


@dataclass(frozen=True, eq=False)
class LoraStack:
    """Ragged stack of low-rank factors; ranks may differ and be 0 (an adapter that misses the target).

    Adapter ``e`` owns rows ``offsets[e]:offsets[e + 1]`` of both factors, so it can be replaced in place.

    Attributes:
        a_RD: ``(R, D)``.
        b_RO: ``(R, O)``: the transposed B factors, each adapter's rows contiguous.
        scaling_E: ``(E,)`` float32 on the same device; folded into neither factor.
        ranks: Rank of every adapter, ``E`` entries.
    """

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    scaling_E: torch.Tensor
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        rows = sum(self.ranks)
        if self.a_RD.shape[0] != rows or self.b_RO.shape[0] != rows or self.scaling_E.shape != (len(self.ranks),):
            raise IncompatibleError(
                f"ranks {self.ranks} give {rows} rows and {len(self.ranks)} scalings; got a {tuple(self.a_RD.shape)}, "
                f"b {tuple(self.b_RO.shape)}, scaling {tuple(self.scaling_E.shape)}"
            )

    @property
    def num_adapters(self) -> int:
        """``E``."""
        return len(self.ranks)

    @property
    def offsets(self) -> tuple[int, ...]:
        """``E + 1`` row offsets; adapter ``e`` owns ``offsets[e]:offsets[e + 1]``."""
        return (0, *accumulate(self.ranks))

    @property
    def b_cat(self) -> torch.Tensor:
        """``(O, R)`` view of ``b_RO``."""
        return self.b_RO.T

    def row_coefficients(self, gates: torch.Tensor) -> torch.Tensor:
        """Spread ``gates (..., E)`` over rank rows, scaling included: ``(..., R)`` in the gates' dtype."""
        scaled = gates * self.scaling_E.to(gates.dtype)
        repeats = torch.tensor(self.ranks, device=gates.device)
        return scaled.repeat_interleave(repeats, dim=-1, output_size=sum(self.ranks))
