"""SlicedStack: the factors of several targets that read the same input (q, k and v; gate and up), fused into one.

Shape letters: ``S`` slices, ``E`` adapters, ``R`` rank rows of all slices and adapters, ``D`` input width, ``O``
output width of all slices together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack, RowIndex


@dataclass(frozen=True, eq=False)
class SlicedStack:
    """Adapters of ``S`` targets with one input; the result's columns are the outputs of the slices, side by side.

    Rank rows lie slice by slice and adapter by adapter. Ranks and scalings may differ between slices and be 0 (an
    adapter that misses a target). `slices` are views, so a slot can be written in place through them.

    Attributes:
        a_RD: ``(R, D)``.
        b_flat: ``(Σ_s R_s O_s,)``: the ``(R_s, O_s)`` transposed B factors of every slice, one after the other.
        scaling_SE: ``(S, E)`` float32; folded into neither factor.
        ranks: Per slice the rank of every adapter.
        widths: ``O_s`` of every slice.
        live_SE: ``(S, E)`` int32: how many rows of each adapter hold something; ``ranks`` when not given.
        indices: Of the slices; built from ``ranks`` when not given. Their live ranks are the rows of ``live_SE``.
        derived: What backends made from this stack once and keep with it.
    """

    a_RD: torch.Tensor
    b_flat: torch.Tensor
    scaling_SE: torch.Tensor
    ranks: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    live_SE: torch.Tensor = field(default=None, repr=False)  # type: ignore[assignment]  # filled in below
    indices: tuple[RowIndex, ...] = field(default=(), repr=False)
    derived: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        rows = [sum(own) for own in self.ranks]
        values = sum(own * width for own, width in zip(rows, self.widths, strict=False))
        adapters = {len(own) for own in self.ranks}
        if not self.ranks or len(self.ranks) != len(self.widths) or len(adapters) != 1:
            raise IncompatibleError(
                f"a sliced stack needs one width and one list of ranks per slice, equally many adapters in each; got "
                f"{len(self.widths)} widths and lists of {[len(own) for own in self.ranks]} ranks"
            )
        shapes = (tuple(self.b_flat.shape), tuple(self.scaling_SE.shape), self.a_RD.shape[0])
        if shapes != ((values,), (len(self.ranks), *adapters), sum(rows)):
            raise IncompatibleError(
                f"ranks {self.ranks} and widths {self.widths} give a ({sum(rows)}, D), b ({values},) and scaling "
                f"{(len(self.ranks), *adapters)}; got a {tuple(self.a_RD.shape)}, b {shapes[0]}, scaling {shapes[1]}"
            )
        if self.live_SE is None:
            object.__setattr__(self, "live_SE", torch.tensor(self.ranks, dtype=torch.int32, device=self.a_RD.device))
        indices = self.indices
        if not indices:
            thin = [self.a_RD.new_zeros(own, 0) for own in rows]
            made = (LoraStack(one, one, self.scaling_SE[0], own) for one, own in zip(thin, self.ranks, strict=True))
            indices = tuple(one.index for one in made)
        own_live = (index._replace(ranks_E=live) for index, live in zip(indices, self.live_SE, strict=True))
        object.__setattr__(self, "indices", tuple(own_live))

    @classmethod
    def of(cls, stacks: Sequence[LoraStack]) -> SlicedStack:
        """Copy stacks of the same adapters and input width into one; differentiable in their factors and scalings.

        Args:
            stacks: One per slice, in the order of the output's columns.

        Raises:
            IncompatibleError: No stack, or input widths or numbers of adapters differ.
        """
        facts = [(one.a_RD.shape[1], one.num_adapters) for one in stacks]
        if len(set(facts)) != 1:
            raise IncompatibleError(
                "slices need one input width and the same adapters; got (input width, adapters) "
                f"{facts or 'of no stack'}; give an adapter that misses a target rank 0 there"
            )
        return cls(
            torch.cat([one.a_RD for one in stacks]),
            torch.cat([one.b_RO.reshape(-1) for one in stacks]),
            torch.stack([one.scaling_E for one in stacks]),
            tuple(one.ranks for one in stacks),
            tuple(one.b_RO.shape[1] for one in stacks),
            torch.stack([one.index.ranks_E for one in stacks]),
            tuple(one.index for one in stacks),
        )

    @property
    def num_slices(self) -> int:
        """``S``."""
        return len(self.ranks)

    @property
    def num_adapters(self) -> int:
        """``E``."""
        return len(self.ranks[0])

    @property
    def num_rows(self) -> int:
        """``R``, of all slices."""
        return self.a_RD.shape[0]

    @property
    def max_rank(self) -> int:
        """Largest rank in any slice."""
        return max((0, *(rank for own in self.ranks for rank in own)))

    @property
    def out_features(self) -> int:
        """``O``."""
        return sum(self.widths)

    @property
    def slices(self) -> tuple[LoraStack, ...]:
        """The stack of every slice, as views of this one; the same objects each time unless something is trained."""
        trained = self.a_RD.requires_grad or self.b_flat.requires_grad or self.scaling_SE.requires_grad
        found: tuple[LoraStack, ...] | None = None if trained else self.derived.get("slices")
        if found is None:
            found = tuple(self._slice_views())
            if not trained and not torch.compiler.is_compiling():
                self.derived["slices"] = found
        return found

    def _slice_views(self) -> list[LoraStack]:
        rows = [sum(own) for own in self.ranks]
        downs = self.a_RD.split(rows)
        ups = self.b_flat.split([own * width for own, width in zip(rows, self.widths, strict=True)])
        return [
            LoraStack(down, up.view(own, width), scaling_E, ranks, index)
            for down, up, own, width, scaling_E, ranks, index in zip(
                downs, ups, rows, self.widths, self.scaling_SE, self.ranks, self.indices, strict=True
            )
        ]

    def cast(self, dtype: torch.dtype) -> SlicedStack:
        """The stack with factors of ``dtype``; a frozen stack keeps the copy until a factor is written to."""
        if self.a_RD.dtype == dtype and self.b_flat.dtype == dtype:
            return self
        tensors = (self.a_RD, self.b_flat, self.scaling_SE)
        kept = not (torch.compiler.is_compiling() or any(one.requires_grad or one.is_inference() for one in tensors))
        versions = tuple(one._version for one in tensors) if kept else None
        found = self.derived.get(dtype) if kept else None
        if found is not None and found[0] == versions:
            return found[1]
        with torch.inference_mode(False):
            down, up = self.a_RD.to(dtype), self.b_flat.to(dtype)
            copy = SlicedStack(down, up, self.scaling_SE, self.ranks, self.widths, self.live_SE, self.indices)
        if kept:
            self.derived[dtype] = (versions, copy)
        return copy


def slice_by_slice(
    stack: SlicedStack,
    base: torch.Tensor | None,
    call: Callable[[LoraStack, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """Run an op on every slice with its columns of ``base`` and put the outputs side by side: ``(..., O)``."""
    bases = [None] * stack.num_slices if base is None else base.split(stack.widths, -1)
    return torch.cat([call(one, part) for one, part in zip(stack.slices, bases, strict=True)], -1)
