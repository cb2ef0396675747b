"""LoraStack: the factors of all adapters of one target, concatenated rank row by rank row.

Shape letters: ``E`` adapters, ``R`` rank rows of all adapters together, ``D`` input width, ``O`` output width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
        offsets: ``E + 1`` row offsets, derived from ``ranks``.
        row_adapter_R: ``(R,)`` int64: the adapter that owns each row.
        row_position_R: ``(R,)`` int64: position of each row inside its adapter.
        row_table_Er: ``(E + 1, max_rank)`` int64: rows of each adapter. Unused places repeat the adapter's first row
            (row 0 for a rank-0 adapter); the last line stands for "no adapter".
        row_valid_Er: ``(E + 1, max_rank)`` bool: which places of ``row_table_Er`` are used.
    """

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    scaling_E: torch.Tensor
    ranks: tuple[int, ...]
    offsets: tuple[int, ...] = field(init=False, repr=False)
    row_adapter_R: torch.Tensor = field(init=False, repr=False)
    row_position_R: torch.Tensor = field(init=False, repr=False)
    row_table_Er: torch.Tensor = field(init=False, repr=False)
    row_valid_Er: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = sum(self.ranks)
        if self.a_RD.shape[0] != rows or self.b_RO.shape[0] != rows or self.scaling_E.shape != (len(self.ranks),):
            raise IncompatibleError(
                f"ranks {self.ranks} give {rows} rows and {len(self.ranks)} scalings; got a {tuple(self.a_RD.shape)}, "
                f"b {tuple(self.b_RO.shape)}, scaling {tuple(self.scaling_E.shape)}"
            )
        object.__setattr__(self, "offsets", (0, *accumulate(self.ranks)))
        for name, value in _row_index(self.ranks).items():
            object.__setattr__(self, name, value.to(self.a_RD.device))

    @property
    def num_adapters(self) -> int:
        """``E``."""
        return len(self.ranks)

    @property
    def num_rows(self) -> int:
        """``R``."""
        return self.offsets[-1]

    @property
    def max_rank(self) -> int:
        """Largest rank; 0 for an empty stack."""
        return max(self.ranks, default=0)

    @property
    def b_cat(self) -> torch.Tensor:
        """``(O, R)`` view of ``b_RO``."""
        return self.b_RO.T

    def row_coefficients(self, gates: torch.Tensor) -> torch.Tensor:
        """Spread ``gates (..., E)`` over rank rows, scaling included: ``(..., R)`` in the gates' dtype."""
        scaled = gates * self.scaling_E.to(gates.dtype)
        return scaled.index_select(-1, self.row_adapter_R)


def _row_index(ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Build the four index tensors of a stack on the CPU; see the attributes of ``LoraStack``."""
    ranks_E = torch.tensor(ranks, dtype=torch.int64)
    starts_E = ranks_E.cumsum(0) - ranks_E
    adapter_R = torch.arange(len(ranks)).repeat_interleave(ranks_E, output_size=sum(ranks))
    places_r = torch.arange(max(ranks, default=0))
    valid_Er = places_r < torch.cat([ranks_E, ranks_E.new_zeros(1)])[:, None]
    firsts_E = torch.where(ranks_E > 0, starts_E, 0)
    table_Er = torch.cat([firsts_E, firsts_E.new_zeros(1)])[:, None] + torch.where(valid_Er, places_r, 0)
    return {
        "row_adapter_R": adapter_R,
        "row_position_R": torch.arange(sum(ranks)) - starts_E[adapter_R],
        "row_table_Er": table_Er,
        "row_valid_Er": valid_Er,
    }
