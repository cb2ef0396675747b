"""Slots: places of fixed capacity in a LoraStack, loaded, replaced and emptied in place while the stack stays in use.

Nothing is allocated, repacked or recompiled by a write: factors, scaling and live rank are copied over the old ones in
the order of the current stream, so kernels, CUDA graphs and cached pointers keep working.

Shape letters: ``E`` slots, ``R`` rank rows of all slots together, ``r`` rank of one adapter, ``D`` input width, ``O``
output width, ``G`` targets that share one set of slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack


class Rows(NamedTuple):
    """Factors of one adapter at one target, both rank row by rank row.

    Attributes:
        a_rD: ``(r, D)``.
        b_rO: ``(r, O)``: the transposed B factor.
    """

    a_rD: torch.Tensor
    b_rO: torch.Tensor


class LoraSlots:
    """The slots of one target.

    Slot ``e`` owns rows ``stack.offsets[e]:stack.offsets[e + 1]``; an adapter of rank ``r`` fills the first ``r`` of
    them and the others are zero, so readers of the whole capacity get the same sums as readers of ``index.ranks_E``.
    Not synchronised: one thread writes, and on a GPU writes go to the current stream.

    Attributes:
        stack: What kernels read; its ``ranks`` are the capacities and never change.
    """

    def __init__(self, stack: LoraStack) -> None:
        """Take over a stack whose slots are all in use, such as the one of a bank that nobody else holds.

        Args:
            stack: Written to from now on. Rows beyond its live ranks must be zero.
        """
        self.stack = stack
        self._live: list[int | None] = list(stack.index.ranks_E.tolist())

    @classmethod
    def empty(
        cls,
        capacities: Sequence[int],
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> LoraSlots:
        """Allocate empty slots.

        Args:
            capacities: Largest rank each slot can hold, ``E`` entries.
            in_features: ``D``.
            out_features: ``O``.
            dtype: Of the factors.
            device: Where they live.

        Raises:
            IncompatibleError: No slot, or a capacity below 1.
        """
        group = SlotGroup.empty(capacities, {"": (in_features, out_features)}, dtype=dtype, device=device)
        return group.slots[""]

    @property
    def capacities(self) -> tuple[int, ...]:
        """Largest rank of every slot."""
        return self.stack.ranks

    def rank(self, slot: int) -> int | None:
        """Return the live rank of a slot, ``None`` for an empty one.

        Raises:
            IncompatibleError: No such slot.
        """
        self._check_slot(slot)
        return self._live[slot]

    def load(self, slot: int, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        """Put an adapter into an empty slot.

        Args:
            slot: Its id from now on.
            a: ``(r, D)``, any dtype and device.
            b: ``(O, r)``.
            scaling: The multiplier of ``b @ a``.

        Raises:
            IncompatibleError: The slot does not exist or is not empty, shapes do not fit, or ``r`` exceeds the slot's
                capacity. Nothing is written then.
        """
        self._check_slot(slot)
        if self._live[slot] is not None:
            raise IncompatibleError(
                f"slot {slot} holds an adapter of rank {self._live[slot]}; use replace, or evict it first"
            )
        self._write(slot, a, b, scaling)

    def replace(self, slot: int, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        """Put an adapter in the place of another one; ranks may differ. Arguments as in ``load``.

        Raises:
            IncompatibleError: The slot does not exist or is empty, shapes do not fit, or ``r`` exceeds the slot's
                capacity. Nothing is written then.
        """
        self._check_slot(slot)
        if self._live[slot] is None:
            raise IncompatibleError(f"slot {slot} is empty; use load")
        self._write(slot, a, b, scaling)

    def evict(self, slot: int) -> None:
        """Empty a slot: its rows, scaling and live rank become 0, so an id that still names it adds nothing.

        Raises:
            IncompatibleError: The slot does not exist or is empty.
        """
        self._check_slot(slot)
        if self._live[slot] is None:
            raise IncompatibleError(f"slot {slot} is empty already")
        with torch.inference_mode(False), torch.no_grad():
            if stale := self.stale(slot, 0):
                torch._foreach_zero_(stale)
            self.stack.scaling_E[slot].zero_()
            self.stack.index.ranks_E[slot].zero_()
        self._live[slot] = None

    def rows(self, slot: int, rank: int) -> Rows:
        """Views of the first ``rank`` rows of a slot.

        Raises:
            IncompatibleError: ``rank`` exceeds the capacity.
        """
        if rank > self.capacities[slot]:
            raise IncompatibleError(
                f"rank {rank} exceeds the capacity {self.capacities[slot]} of slot {slot}; "
                f"the largest slot holds rank {self.stack.max_rank}"
            )
        first = self.stack.offsets[slot]
        return Rows(self.stack.a_RD.narrow(0, first, rank), self.stack.b_RO.narrow(0, first, rank))

    def stale(self, slot: int, rank: int) -> list[torch.Tensor]:
        """Views of what an adapter of ``rank`` would leave of the one before it."""
        beyond = (self._live[slot] or 0) - rank
        if beyond <= 0:
            return []
        first = self.stack.offsets[slot] + rank
        return [self.stack.a_RD.narrow(0, first, beyond), self.stack.b_RO.narrow(0, first, beyond)]

    def mark(self, slot: int, rank: int | None) -> None:
        """Note what a slot holds, for writers that fill ``rows`` themselves (`SlotGroup`)."""
        self._live[slot] = rank

    def _write(self, slot: int, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        stack = self.stack
        width, out = stack.a_RD.shape[1], stack.b_RO.shape[1]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (a.shape[1], b.shape[0]) != (width, out):
            raise IncompatibleError(
                f"slot {slot}: a must be (r, {width}) and b ({out}, r) with one r, "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        rank = a.shape[0]
        rows, stale = self.rows(slot, rank), self.stale(slot, rank)
        with torch.inference_mode(False), torch.no_grad():
            rows.a_rD.copy_(a)
            rows.b_rO.copy_(b.T)
            if stale:
                torch._foreach_zero_(stale)
            stack.scaling_E[slot].fill_(float(scaling))
            stack.index.ranks_E[slot].fill_(rank)
        self._live[slot] = rank

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < len(self._live):
            raise IncompatibleError(f"slot {slot} does not exist; this stack has slots 0 to {len(self._live) - 1}")


class SlotGroup:
    """The same slots at several targets of one device and dtype: an adapter is written at all of them at once.

    Scalings and live ranks of all targets lie in one table each, so a write takes a handful of launches whatever the
    number of targets. Not synchronised, like `LoraSlots`.

    Attributes:
        slots: Target -> its slots, in order.
        scaling_GE: ``(G, E)`` float32; row ``g`` is the ``scaling_E`` of target ``g``.
        ranks_GE: ``(G, E)`` int32; row ``g`` is the ``index.ranks_E`` of target ``g``.
    """

    def __init__(
        self,
        slots: Mapping[str, LoraSlots],
        scaling_GE: torch.Tensor,
        ranks_GE: torch.Tensor,
        capacities: Sequence[int],
    ) -> None:
        self.slots = dict(slots)
        self.scaling_GE = scaling_GE
        self.ranks_GE = ranks_GE
        self.capacities = tuple(capacities)

    @classmethod
    def empty(
        cls,
        capacities: Sequence[int],
        widths: Mapping[str, tuple[int, int]],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> SlotGroup:
        """Allocate empty slots at every target.

        Args:
            capacities: Largest rank each slot can hold, ``E`` entries, the same at every target.
            widths: Target -> ``(D, O)``.
            dtype: Of the factors.
            device: Where they live.

        Raises:
            IncompatibleError: No slot, or a capacity below 1.
        """
        ranks = tuple(capacities)
        if not ranks or min(ranks) < 1:
            raise IncompatibleError(f"slots need at least one capacity and none below 1, got {list(ranks)}")
        with torch.inference_mode(False):
            scaling_GE = torch.zeros(len(widths), len(ranks), device=device)
            ranks_GE = torch.zeros(len(widths), len(ranks), dtype=torch.int32, device=device)
            thin = torch.zeros(sum(ranks), 0, dtype=dtype, device=device)
            index = LoraStack(thin, thin, torch.zeros(len(ranks), device=device), ranks).index
            slots: dict[str, LoraSlots] = {}
            for row, (target, (width, out)) in enumerate(widths.items()):
                a_RD = torch.zeros(sum(ranks), width, dtype=dtype, device=device)
                b_RO = torch.zeros(sum(ranks), out, dtype=dtype, device=device)
                own = index._replace(ranks_E=ranks_GE[row])
                slots[target] = LoraSlots(LoraStack(a_RD, b_RO, scaling_GE[row], ranks, own))
                for slot in range(len(ranks)):
                    slots[target].mark(slot, None)
        return cls(slots, scaling_GE, ranks_GE, ranks)

    def write(self, slot: int, sources: Sequence[Rows | None], scaling_G: torch.Tensor, ranks_G: torch.Tensor) -> None:
        """Put one adapter into a slot at every target, over whatever is there.

        Args:
            slot: Which one.
            sources: Per target its factors on the slots' device, or ``None`` where the adapter has none.
            scaling_G: ``(G,)`` float32 on the slots' device.
            ranks_G: ``(G,)`` int32 on the slots' device: the ranks of ``sources``.

        Raises:
            IncompatibleError: A rank exceeds the slot's capacity. Nothing is written then.
        """
        into: list[torch.Tensor] = []
        given: list[torch.Tensor] = []
        stale: list[torch.Tensor] = []
        ranks = [0 if source is None else source.a_rD.shape[0] for source in sources]
        for slots, source, rank in zip(self.slots.values(), sources, ranks, strict=True):
            if source is not None:
                into += slots.rows(slot, rank)
                given += source
            stale += slots.stale(slot, rank)
        with torch.inference_mode(False), torch.no_grad():
            if into:
                torch._foreach_copy_(into, given)
            if stale:
                torch._foreach_zero_(stale)
            self.scaling_GE[:, slot].copy_(scaling_G)
            self.ranks_GE[:, slot].copy_(ranks_G)
        for slots, rank in zip(self.slots.values(), ranks, strict=True):
            slots.mark(slot, rank)


def live_ranks(stack: LoraStack) -> tuple[int, ...]:
    """How many rows of each slot or adapter hold something; reads them from the device.

    While a graph is traced nothing is read and the capacities stand in: the same sums, with zeros added.
    """
    return stack.ranks if torch.compiler.is_compiling() else tuple(stack.index.ranks_E.tolist())
