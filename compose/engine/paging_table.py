"""Which adapter goes into which slot: mixed capacities, the least recently used leaves first. No tensors here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple


class Load(NamedTuple):
    """One write: ``name`` goes into ``slot``, over whatever is there."""

    name: str
    slot: int


class SlotTable:
    """Who is in which slot, and who was used when.

    Attributes:
        capacities: Largest rank every slot can hold.
    """

    def __init__(self, capacities: Sequence[int]) -> None:
        self.capacities = tuple(capacities)
        self._names: list[str | None] = [None] * len(self.capacities)
        self._slots: dict[str, int] = {}
        self._used = [0] * len(self.capacities)
        self._clock = 0

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, name: str) -> int:
        """The slot that holds ``name``; ``KeyError`` when none does."""
        return self._slots[name]

    def fits(self, ranks: Iterable[int]) -> bool:
        """Whether adapters of these ranks can be held at the same time."""
        needed = sorted(ranks, reverse=True)
        room = sorted(self.capacities, reverse=True)
        return len(needed) <= len(room) and all(rank <= most for rank, most in zip(needed, room, strict=False))

    def place(self, wanted: Mapping[str, int], busy: Collection[int] = ()) -> list[Load] | None:
        """Return the writes after which all of ``wanted`` are held, without doing them.

        What is held already stays where it is, unless a larger adapter needs that slot. An adapter goes to an empty
        slot if one can hold it, the smallest such, else over the least recently used adapter of the smallest capacity.

        Args:
            wanted: Name -> rank.
            busy: Slots that must not be written to.

        Returns:
            The writes in order, or ``None`` where the slots that are not busy cannot hold them.
        """
        kept = {self._slots[name]: rank for name, rank in wanted.items() if name in self._slots}
        missing = [(-rank, number, name) for number, (name, rank) in enumerate(wanted.items()) if name not in self]
        heapify(missing)
        taken = {*kept, *busy}
        free = sorted((slot for slot in range(len(self.capacities)) if slot not in taken), key=self._preference)
        loads: list[Load] = []
        while missing:
            negative, _, name = heappop(missing)
            slot = next((slot for slot in free if self.capacities[slot] >= -negative), None)
            if slot is not None:
                free.remove(slot)
            else:
                movable = [
                    (rank, slot)
                    for slot, rank in kept.items()
                    if self.capacities[slot] >= -negative > rank and slot not in busy
                ]
                if not movable:
                    return None
                rank, slot = min(movable)
                del kept[slot]
                heappush(missing, (-rank, len(wanted) + slot, str(self._names[slot])))
            loads.append(Load(name, slot))
        return loads

    def hold(self, load: Load) -> str | None:
        """Note one write; return the name that lost its slot by it."""
        before = self._names[load.slot]
        if before is not None:
            del self._slots[before]
        self._names[load.slot] = load.name
        self._slots[load.name] = load.slot
        return before

    def touch(self, names: Iterable[str]) -> None:
        """Note a use of every name that is held."""
        for name in names:
            if name in self._slots:
                self._clock += 1
                self._used[self._slots[name]] = self._clock

    def _preference(self, slot: int) -> tuple[bool, int, int, int]:
        return self._names[slot] is not None, self.capacities[slot], self._used[slot], slot
