"""LoraStack: the factors of all adapters of one target, concatenated rank row by rank row.

Shape letters: ``E`` adapters, ``R`` rank rows of all adapters together, ``D`` input width, ``O`` output width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from compose.errors import IncompatibleError


class RowIndex(NamedTuple):
    """Where rank rows lie; derived from the ranks alone, so every cast of a stack shares it.

    Attributes:
        adapter_R: ``(R,)`` int64: the adapter that owns each row.
        position_R: ``(R,)`` int64: position of each row inside its adapter.
        table_Er: ``(E + 1, max_rank)`` int64: rows of each adapter. Unused places repeat the adapter's first row
            (row 0 for a rank-0 adapter); the last line stands for "no adapter".
        valid_Er: ``(E + 1, max_rank)`` bool: which places of ``table_Er`` are used.
        starts_E: ``(E,)`` int32: first row of each adapter.
        ranks_E: ``(E,)`` int32: how many rows of each adapter hold something; its rank, or less where a slot of that
            rank holds a smaller adapter (rows beyond are zero). Read by the Triton kernels only.
    """

    adapter_R: torch.Tensor
    position_R: torch.Tensor
    table_Er: torch.Tensor
    valid_Er: torch.Tensor
    starts_E: torch.Tensor
    ranks_E: torch.Tensor


class Spread(NamedTuple):
    """How gates become coefficients of rank rows.

    Attributes:
        matrix_RE: ``(R, E)``: the scaling where a row belongs to an adapter, else 0.
        wide: The same behind a column of zeros, for gates of no adapter.
        alike: Ranks and scalings; stacks for which they are equal have the same row coefficients.
        complete: Whether every adapter has rows.
        even: Rank and scaling, where all adapters have the same.
    """

    matrix_RE: torch.Tensor
    wide: torch.Tensor
    alike: tuple[tuple[int, ...], tuple[float, ...]]
    complete: bool
    even: tuple[int, float] | None


_FEW_ADAPTERS = 16
"""Up to so many a CPU spreads gates over rank rows twice as fast by a product as by copies."""


@dataclass(frozen=True, eq=False)
class LoraStack:
    """Ragged stack of low-rank factors; ranks may differ and be 0 (an adapter that misses the target).

    Adapter ``e`` owns rows ``offsets[e]:offsets[e + 1]`` of both factors, so it can be replaced in place.

    Attributes:
        a_RD: ``(R, D)``.
        b_RO: ``(R, O)``: the transposed B factors, each adapter's rows contiguous.
        scaling_E: ``(E,)`` float32 on the same device; folded into neither factor.
        ranks: Rank of every adapter, ``E`` entries.
        index: Built from ``ranks`` when not given.
        offsets: ``E + 1`` row offsets, derived from ``ranks``.
        derived: What backends made from this stack once and keep with it.
    """

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    scaling_E: torch.Tensor
    ranks: tuple[int, ...]
    index: RowIndex = field(default=None, repr=False)  # type: ignore[assignment]  # filled in below
    offsets: tuple[int, ...] = field(init=False, repr=False)
    derived: dict[str, Any] = field(init=False, repr=False, default_factory=dict)
    _casts: dict[torch.dtype, tuple[tuple[int, int, int], LoraStack]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        rows = sum(self.ranks)
        if self.a_RD.shape[0] != rows or self.b_RO.shape[0] != rows or self.scaling_E.shape != (len(self.ranks),):
            raise IncompatibleError(
                f"ranks {self.ranks} give {rows} rows and {len(self.ranks)} scalings; got a {tuple(self.a_RD.shape)}, "
                f"b {tuple(self.b_RO.shape)}, scaling {tuple(self.scaling_E.shape)}"
            )
        object.__setattr__(self, "offsets", (0, *accumulate(self.ranks)))
        if self.index is None:
            with torch.inference_mode(False):  # it stays with the model
                object.__setattr__(self, "index", _row_index(self.ranks, self.a_RD.device))

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
        return max((0, *self.ranks))

    @property
    def b_cat(self) -> torch.Tensor:
        """``(O, R)`` view of ``b_RO``."""
        return self.b_RO.T

    def factors(self, adapter: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``(rank, D)`` and ``(rank, O)`` of one adapter."""
        rows = slice(self.offsets[adapter], self.offsets[adapter + 1])
        return self.a_RD[rows], self.b_RO[rows]

    def row_coefficients(self, gates: torch.Tensor) -> torch.Tensor:
        """Spread ``gates (..., E)`` over rank rows, scaling included: ``(..., R)`` in the gates' dtype."""
        if gates.dim() > 1 and gates.dtype == torch.float32 and not torch.compiler.is_compiling():
            spread = self.spread()
            if spread is not None and not torch.is_autocast_enabled("cpu"):
                return torch.nn.functional.linear(gates, spread.matrix_RE)
        scaled = gates * self.scaling_E.to(gates.dtype)
        if self.num_adapters * self.max_rank == self.num_rows:  # ten times as fast on a CPU as picking columns
            return scaled[..., None].expand(*scaled.shape, self.max_rank).flatten(-2)
        return scaled.index_select(-1, self.index.adapter_R)

    def spread(self) -> Spread | None:
        """How gates become row coefficients by one product; None where they do not.

        They do on a CPU, with few adapters and frozen scalings; not in traced code, nor under autocast, which rounds.
        """
        scaling_E, found = self.scaling_E, self.derived.get("spread")
        if found is not None and found[0] == scaling_E._version and not scaling_E.requires_grad:
            return found[1]
        if self.num_adapters > _FEW_ADAPTERS or scaling_E.device.type != "cpu":
            return None
        if scaling_E.requires_grad or scaling_E.is_inference():
            return None
        with torch.inference_mode(False):
            matrix_RE = torch.nn.functional.one_hot(self.index.adapter_R, self.num_adapters).to(scaling_E.dtype)
            matrix_RE = matrix_RE * scaling_E
            alike = (self.ranks, tuple(scaling_E.tolist()))
            kinds = set(zip(*alike, strict=True))
            wide = torch.nn.functional.pad(matrix_RE, (1, 0))
            spread = Spread(matrix_RE, wide, alike, all(self.ranks), kinds.pop() if len(kinds) == 1 else None)
        self.derived["spread"] = (scaling_E._version, spread)
        return spread

    def present(self) -> torch.Tensor:
        """``(E,)`` bool: which adapters have rows. Made once: on a GPU it is a copy that the host waits for."""
        found = self.derived.get("present")
        if found is None:
            with torch.inference_mode(False):
                found = torch.tensor([rank > 0 for rank in self.ranks], device=self.scaling_E.device)
            self.derived["present"] = found
        return found

    def versions(self) -> tuple[int, int, int] | None:
        """Version counters of the three tensors: equal counters, unchanged values. None where nothing may be cached.

        That is when a factor is trained (gradients must reach it) or is an inference tensor (which has no counter).
        Writes through ``tensor.data`` or a NumPy view are invisible to torch and so to this.
        """
        a, b, scaling = self.a_RD, self.b_RO, self.scaling_E
        if a.requires_grad or b.requires_grad or scaling.requires_grad:
            return None
        if a.is_inference() or b.is_inference() or scaling.is_inference():
            return None
        return a._version, b._version, scaling._version

    def cast(self, dtype: torch.dtype) -> LoraStack:
        """The stack with factors of ``dtype``; a frozen stack keeps the copy until a factor is written to."""
        if self.a_RD.dtype == dtype and self.b_RO.dtype == dtype:
            return self
        versions = None if torch.compiler.is_compiling() else self.versions()
        found = self._casts.get(dtype) if versions is not None else None
        if found is not None and found[0] == versions:
            return found[1]
        with torch.inference_mode(False):
            copy = LoraStack(self.a_RD.to(dtype), self.b_RO.to(dtype), self.scaling_E, self.ranks, self.index)
        if versions is not None:
            self._casts[dtype] = (versions, copy)
        return copy


def _row_index(ranks: tuple[int, ...], device: torch.device) -> RowIndex:
    """Build the index of a stack on the CPU and move it to ``device``."""
    ranks_E = torch.tensor(ranks, dtype=torch.int64)
    starts_E = ranks_E.cumsum(0) - ranks_E
    adapter_R = torch.arange(len(ranks)).repeat_interleave(ranks_E, output_size=sum(ranks))
    places_r = torch.arange(max(ranks, default=0))
    valid_Er = places_r < torch.cat([ranks_E, ranks_E.new_zeros(1)])[:, None]
    firsts_E = torch.where(ranks_E > 0, starts_E, 0)
    table_Er = torch.cat([firsts_E, firsts_E.new_zeros(1)])[:, None] + torch.where(valid_Er, places_r, 0)
    position_R = torch.arange(sum(ranks)) - starts_E[adapter_R]
    tensors = (adapter_R, position_R, table_Er, valid_Er, starts_E.int(), ranks_E.int())
    return RowIndex(*(tensor.to(device) for tensor in tensors))
