"""Banks that do not fit: a fixed number of slots on the device, the other adapters in host memory or on disk."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.attach import AttachedModel, _composed, _fitting_modules, _place, _refuse_attached
from compose.engine.coefficients import Selection
from compose.engine.generate import token_rows
from compose.engine.layers import RuntimeState
from compose.engine.paging_host import HostTier, Page
from compose.engine.paging_lane import Lane
from compose.engine.paging_numbers import Numbered, named, translated, versions
from compose.engine.paging_table import Load, SlotTable
from compose.engine.rows import RowAdapter
from compose.errors import IncompatibleError

Overflow = Literal["refuse", "split"]


def attach_paged(
    model: nn.Module,
    bank: Bank,
    *,
    slots: int | Mapping[int, int],
    host_bytes: int = 4 << 30,
    overflow: Overflow = "refuse",
    backend: str = "auto",
) -> PagedModel:
    """Attach a bank of which only ``slots`` adapters are on the device at a time; the handle is used as any other.

    Setting coefficients brings the adapters they name into slots, the least recently used others leave, and the
    adapters of the selection in force never do. Adapters come from pinned host memory when they were used before and
    from the bank when not: files are read one adapter at a time by the bank's own readers, checked and hashed as ever.

    Args:
        model: As for ``attach``; move and cast it before, not after.
        bank: Any number of adapters; nothing is read yet.
        slots: How many adapters the device holds: capacity rank -> number of slots, or a number of slots for the
            largest rank of the bank.
        host_bytes: Most bytes of adapters kept in host memory, pinned where the device is a GPU. The adapters of one
            batch that are on their way to the device may exceed it for as long as that takes.
        overflow: What ``generate`` does with a batch that names more adapters than there are slots: ``"refuse"``, or
            ``"split"`` it and run the parts one after another.
        backend: As for ``attach``.

    Returns:
        The handle; as a context manager it detaches on exit.

    Raises:
        IncompatibleError: As for ``attach``, or slots or bytes that are no such numbers.
    """
    _refuse_attached(model)
    fitting = _fitting_modules(model, bank)
    if overflow not in ("refuse", "split"):
        raise IncompatibleError(f"overflow must be 'refuse' or 'split', got {overflow!r}")
    if host_bytes < 0:
        raise IncompatibleError(f"host_bytes must be at least 0, got {host_bytes}")
    pager = Pager(bank, fitting, _capacities(bank, slots), host_bytes)
    state = RuntimeState(backend, pager.place)
    layers = {
        target: _composed(module, pager.stack(target), target, state, bank.targets[target].kind)
        for target, module in fitting.items()
    }
    pager.watch(layers)
    return PagedModel(model, bank, layers, state, pager, overflow)


@dataclass
class PagingCounters:
    """What happened since the handle was made or the counters were reset.

    Every adapter that a new selection names counts once, as a hit, as prefetched or as a miss.

    Attributes:
        hits: It was in a slot from earlier use.
        prefetched: It was in a slot because ``prefetch`` had brought it there, and is used for the first time since.
        misses: It was brought into a slot while the batch waited.
        evictions: Adapters that lost their slot.
        loads: Writes of an adapter into a slot.
        bytes: Bytes of those writes.
        seconds: Time the calling threads spent on loading. On a GPU copies go on after that.
        host_hits: Loads whose adapter was in host memory.
        reads: Loads whose adapter came from the bank: from disk, or packed anew.
        bytes_read: Bytes of those.
    """

    hits: int = 0
    prefetched: int = 0
    misses: int = 0
    evictions: int = 0
    loads: int = 0
    bytes: int = 0
    seconds: float = 0.0
    host_hits: int = 0
    reads: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of ``hits``; 0 before the first selection."""
        total = self.hits + self.prefetched + self.misses
        return self.hits / total if total else 0.0


@dataclass(frozen=True, eq=False)
class _Placed:
    """A selection in the numbering of the slots.

    Attributes:
        selection: It; ``None`` when it names no adapter.
        slots: Name -> slot for which it was made.
        versions: Write counters of the numbers that name adapters; ``None`` where they have none.
    """

    selection: Selection | None
    slots: dict[str, int]
    versions: tuple[int, ...] | None


class Pager:
    """Slots, host memory and bank behind one handle.

    One lock per pager: any thread may prefetch while another sets coefficients or runs the model. Setting coefficients
    and the forward passes that use them belong to one thread and, on a GPU, to one stream.
    """

    def __init__(
        self, bank: Bank, modules: Mapping[str, nn.Module], capacities: Sequence[int], host_bytes: int
    ) -> None:
        self.bank = bank
        self.table = SlotTable(capacities)
        self.counters = PagingCounters()
        self.host = HostTier(host_bytes, self._read)
        places = {target: _place(module) for target, module in modules.items()}
        self.lanes = [
            Lane(
                {
                    target: (bank.targets[target].in_features, bank.targets[target].out_features)
                    for target, place in places.items()
                    if place == (dtype, device)
                },
                capacities,
                dtype,
                device,
            )
            for dtype, device in dict.fromkeys(places.values())
        ]
        self._pinned = any(lane.device.type == "cuda" for lane in self.lanes)
        self._lock = threading.RLock()
        self._layers: Mapping[str, Any] = {}
        self._ranks: dict[str, int] = {}
        self._in_force: dict[str, int] = {}
        self._fresh: set[str] = set()
        self._known: WeakKeyDictionary[Selection, _Placed] = WeakKeyDictionary()

    def stack(self, target: str) -> Any:
        """What the layer of ``target`` reads."""
        return next(lane.stacks[target] for lane in self.lanes if target in lane.stacks)

    def watch(self, layers: Mapping[str, Any]) -> None:
        """Name the layers that must go on reading the slots."""
        self._layers = layers

    def place(self, selection: Selection | None) -> Selection | None:
        """Bring the adapters of ``selection`` into slots, let go of those before it; return it in slot numbers.

        Raises:
            IncompatibleError: It names more adapters than there are slots, one that fits no slot, or the model was
                moved or cast. What was in force before is still in its slots then.
            AdapterFormatError: An adapter cannot be read; likewise.
        """
        if selection is not None and not isinstance(selection, Numbered):
            raise IncompatibleError(
                f"a paged bank must know its adapters before the model runs, and a {type(selection).__name__} chooses "
                "them inside; use attach(model, bank)"
            )
        with self._lock:
            if selection is not None:
                self._check_layers()
            self._release()  # what follows may write to slots of the batch that runs now
            placed = None if selection is None else self._placed(selection)
            self._in_force = {} if placed is None else placed.slots
            if placed is None:
                return None
            self.table.touch(placed.slots)
            for lane in self.lanes:
                lane.wait(placed.slots.values())
            return placed.selection

    def prefetch(self, names: Iterable[str]) -> int:
        """Bring adapters into slots that nothing in force uses; see ``PagedModel.prefetch``."""
        wanted = list(dict.fromkeys(names))
        ranks = {name: self._rank(name) for name in wanted}
        with self._lock:
            self._check_layers()
            self.table.touch(wanted)
            busy = {*self._in_force.values(), *(self.table.slot(name) for name in wanted if name in self.table)}
            for name in wanted:
                if name in self.table:
                    continue
                loads = self.table.place({name: ranks[name]}, busy)
                if not loads:
                    continue
                began = time.perf_counter()
                self._write(loads, [self.host.get(name)], (name,))
                self.counters.seconds += time.perf_counter() - began
                self._fresh.add(name)
                self.table.touch([name])
                busy.add(self.table.slot(name))
            return sum(name in self.table for name in wanted)

    def obstacle(self, names: Collection[str]) -> str | None:
        """Why these adapters cannot be in slots at the same time; ``None`` if they can."""
        most = max(self.table.capacities)
        large = next((name for name in names if self._rank(name) > most), None)
        if large is not None:
            rank = self._rank(large)
            return f"adapter {large!r} has rank {rank}, the largest slot holds {most}; attach with slots={{{rank}: n}}"
        if self.table.fits(self._rank(name) for name in names):
            return None
        counts = Counter(self.table.capacities)
        room = ", ".join(f"{counts[rank]} of rank {rank}" for rank in sorted(counts))
        return (
            f"{len(names)} adapters are named, more than the slots hold at once ({room}); attach with more slots, or "
            "give smaller batches: attached.split(adapters) makes them, overflow='split' lets generate do it"
        )

    def take_counters(self, *, reset: bool = False) -> PagingCounters:
        """Return the counters so far."""
        with self._lock:
            host = self.host
            now = replace(self.counters, host_hits=host.hits, reads=host.reads, bytes_read=host.bytes_read)
            if reset:
                self.counters = PagingCounters()
                host.hits = host.reads = host.bytes_read = 0
            return now

    def close(self) -> None:
        """Free the host memory; the slots go with the layers."""
        with self._lock:
            self._release()
            self.host.clear()
            for lane in self.lanes:
                lane.close()

    def _placed(self, selection: Numbered) -> _Placed:
        known, written = self._known.get(selection), versions(selection)
        if known is not None and written is not None and known.versions == written and self._still(known.slots):
            return known
        numbers = named(selection)
        wanted = {self.bank.names[number]: self._rank(self.bank.names[number]) for number in numbers}
        loads = self.table.place(wanted)
        if loads is None:
            raise IncompatibleError(self.obstacle(wanted))
        began = time.perf_counter()
        pages = [self.host.get(load.name) for load in loads]  # all of them first: a broken file changes nothing
        self._count(wanted)
        self._write(loads, pages, wanted)
        self.counters.seconds += time.perf_counter() - began
        slots = {name: self.table.slot(name) for name in wanted}
        by_number = dict(zip(numbers, slots.values(), strict=True))
        self._known[selection] = placed = _Placed(translated(selection, by_number, len(self.bank)), slots, written)
        return placed

    def _write(self, loads: Sequence[Load], pages: Sequence[Page], wanted: Collection[str]) -> None:
        for load, page in zip(loads, pages, strict=True):
            before = self.table.hold(load)
            self.counters.evictions += before is not None and before not in wanted
            self._fresh.discard(before or "")
            for lane, layout, buffer in zip(self.lanes, page.layouts, page.buffers, strict=True):
                lane.write(load.slot, layout, buffer)
            self.counters.bytes += page.nbytes
        self.counters.loads += len(loads)

    def _still(self, slots: Mapping[str, int]) -> bool:
        return all(name in self.table and self.table.slot(name) == slot for name, slot in slots.items())

    def _count(self, wanted: Iterable[str]) -> None:
        """Count a new selection, before anything moves."""
        for name in wanted:
            self.counters.prefetched += name in self._fresh
            self.counters.hits += name in self.table and name not in self._fresh
            self.counters.misses += name not in self.table
            self._fresh.discard(name)

    def _read(self, name: str) -> Page:
        shapes = self.bank.shapes(name)
        layouts = [
            lane.layout([shapes[target].rank if target in shapes else 0 for target in lane.targets])
            for lane in self.lanes
        ]
        updates = self.bank[name].targets
        buffers = []
        with torch.inference_mode(False), torch.no_grad():
            for layout in layouts:
                buffer = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
                layout.fill(buffer, updates)
                buffers.append(buffer)
        return Page(layouts, buffers)

    def _rank(self, name: str) -> int:
        if name not in self._ranks:
            self._ranks[name] = max((shape.rank for shape in self.bank.shapes(name).values()), default=0)
        return self._ranks[name]

    def _release(self) -> None:
        for lane in self.lanes:
            lane.release(self._in_force.values())

    def _check_layers(self) -> None:
        """Raise where a layer no longer reads the slots; where only its view of them is gone, give it back."""
        for target, layer in self._layers.items():
            stack = self.stack(target)
            if layer.stack is stack:
                continue
            same = layer.a_RD is stack.a_RD and layer.b_RO is stack.b_RO and layer.scaling_E is stack.scaling_E
            if not same:
                raise IncompatibleError(
                    f"{target}: the model was moved or cast after attach_paged, so its layers no longer read the "
                    "slots; detach, move or cast it, and attach again"
                )
            layer._stack = stack


class PagedModel(AttachedModel):
    """A live model with a bank of which only some adapters are on the device; see `attach_paged`.

    ``set``, ``using`` and ``generate`` take what they take on any handle; a list for ``set`` or ``using`` may also
    hold mappings of names to weights. A selection's adapters are read when it is set: numbers that name adapters, and
    dense coefficients, take effect as they are then; values of sparse ones may be written in place later.

    Attributes:
        overflow: ``"refuse"`` or ``"split"``.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: Bank,
        layers: Mapping[str, Any],
        state: RuntimeState,
        pager: Pager,
        overflow: Overflow,
    ) -> None:
        super().__init__(model, bank, layers, state, trainable=False)
        self.overflow = overflow
        self._pager = pager

    @property
    def counters(self) -> PagingCounters:
        """A copy of the counters."""
        return self._pager.take_counters()

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters in slots, in the bank's order."""
        return tuple(name for name in self.bank.names if name in self._pager.table)

    @property
    def placed(self) -> Selection | None:
        """What is in force, in slot numbers, as the layers read it.

        A captured CUDA graph reads the tensors of the selection it was captured under: keep that one, and copy the
        numbers of a later one into it, ``first.ids.copy_(attached.placed.ids)``, before the graph is replayed.
        """
        return self._state.placed

    def reset_counters(self) -> PagingCounters:
        """Return the counters and start them again at 0."""
        return self._pager.take_counters(reset=True)

    def prefetch(self, names: Iterable[str]) -> int:
        """Bring adapters into slots ahead of the batch that will name them, while another one runs.

        Adapters of the selection in force keep their slots; of ``names``, those for which no slot is left stay where
        they are. On a GPU copies run on a stream of their own; elsewhere the call returns when they are done. Reading
        files is the calling thread's work in any case: call it from a thread of its own to hide that too.

        Returns:
            How many of ``names`` are in slots now.

        Raises:
            UnknownNameError: A name is not in the bank.
            AdapterFormatError: An adapter cannot be read; those before it are loaded.
        """
        return self._pager.prefetch(names)

    def split(self, adapters: Sequence[RowAdapter]) -> Iterator[list[int]]:
        """Yield row numbers of sub-batches, each of which names no more adapters than the slots hold.

        Every row goes into the first sub-batch with room for its adapters, so rows that share adapters tend to meet.

        Args:
            adapters: One per row: a name, a mapping of names to weights, or ``None``.

        Raises:
            IncompatibleError: One row alone names more adapters than the slots hold.
            UnknownNameError: A name is not in the bank.
        """
        parts: list[tuple[set[str], list[int]]] = []
        for row, adapter in enumerate(adapters):
            names: set[str] = set() if adapter is None else {adapter} if isinstance(adapter, str) else set(adapter)
            obstacle = self._pager.obstacle(names)
            if obstacle is not None:
                raise IncompatibleError(f"row {row}: {obstacle}")
            part = next((one for one in parts if self._pager.obstacle(one[0] | names) is None), None)
            if part is None:
                part = (set(), [])
                parts.append(part)
            part[0].update(names)
            part[1].append(row)
        for _, rows in parts:
            yield rows

    def generate(self, inputs: Any, adapters: Sequence[RowAdapter] | None = None, **options: Any) -> list[list[int]]:
        """As ``AttachedModel.generate``; with ``overflow="split"`` batches that name too many adapters run in parts.

        Raises:
            IncompatibleError: As there; or too many adapters with ``overflow="refuse"``.
            UnknownNameError: A name is not in the bank.
        """
        prompts = token_rows(inputs)
        whole = adapters is None or isinstance(adapters, str | Mapping) or len(adapters) != len(prompts)
        if adapters is None or whole or self.overflow == "refuse":
            return super().generate(prompts, adapters, **options)
        results: dict[int, list[list[int]]] = {}
        for rows in list(self.split(adapters)):
            found = super().generate([prompts[row] for row in rows], [adapters[row] for row in rows], **options)
            copies = len(found) // len(rows)
            results |= {row: found[at * copies : (at + 1) * copies] for at, row in enumerate(rows)}
        return [one for row in range(len(prompts)) for one in results[row]]

    def export(self) -> list[Adapter]:
        """Return all adapters of the bank; those of a file are read from it."""
        return [self.bank[name] for name in self.bank.names]

    def detach(self) -> nn.Module:
        """Restore the very same module objects, free the host memory and return the model."""
        model = super().detach()
        self._pager.close()
        return model

    def _resolve(self, selection: object) -> Selection | None:
        """Also a list with weighted sets among its rows."""
        if isinstance(selection, Sequence) and any(isinstance(one, Mapping) for one in selection):
            return self._rows(selection, len(selection), "outputs")
        return super()._resolve(selection)


def _capacities(bank: Bank, slots: int | Mapping[int, int]) -> tuple[int, ...]:
    if isinstance(slots, int):
        ranks = [shape.rank for name in bank.names for shape in bank.shapes(name).values()]
        slots = {max([1, *ranks]): slots}
    if not slots or any(rank < 1 or count < 1 for rank, count in slots.items()):
        raise IncompatibleError(
            f"slots must be a number of at least 1, or a mapping of ranks to such numbers, got {dict(slots)}"
        )
    return tuple(rank for rank in sorted(slots) for _ in range(slots[rank]))
