"""Bank: named adapters over one base model, opened from headers alone and stacked target by target on first use.

Shape letters: ``E`` adapters, ``R`` rank rows of all adapters together, ``D`` input width, ``O`` output width.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch

from compose.adapter import Adapter, LowRank, TargetKind
from compose.errors import AdapterFormatError, DuplicateNameError, IncompatibleError, UnknownNameError
from compose.files.memory import enough_memory
from compose.formats import discover, format_of
from compose.formats.entry import Entry, FileEntry, MemoryEntry
from compose.formats.header import TargetHeader, check_name, natural_key
from compose.kernels.side_by_side import empty_side_by_side
from compose.kernels.stack import LoraStack

if TYPE_CHECKING:
    from compose.hub_index.store import Index

_SHOWN_PROBLEMS = 20


class TargetShape(NamedTuple):
    """What every adapter of a bank agrees on for one target."""

    kind: TargetKind
    in_features: int
    out_features: int


class Bank:
    """Ordered, named adapters over one base model.

    Opening reads configurations and weight headers only. The first use of `stacks` reads every file once, hashes its
    bytes and copies the factors into one preallocated stack per target; from then on `bank[name]` gives views of it.
    Reading is
    transactional: an error leaves the bank as it was. Any number of threads may read one bank.

    Attributes:
        names: Names in order.
        base: Identifier of the base model, ``""`` when no adapter tells.
        targets: Union of the adapters' targets -> `TargetShape`, in natural order (layer 2 before layer 10).
        problems: With ``strict=False``: what was skipped, folder -> reason.

    Example:
        >>> from compose.adapter import Adapter, LowRank
        >>> update = LowRank(torch.zeros(2, 4), torch.zeros(3, 2), scaling=0.5)
        >>> bank = Bank.from_adapters([Adapter("x", "base", {"lin": update})])
        >>> bank.names, bank.stack("lin").ranks
        (('x',), (2,))
    """

    def __init__(
        self, entries: Sequence[Entry], *, base: str | None = None, problems: Mapping[str, str] | None = None
    ) -> None:
        self._entries = {entry.name: entry for entry in entries}
        if len(self._entries) != len(entries):
            names = [entry.name for entry in entries]
            raise DuplicateNameError(f"adapter names must be unique, given twice: {', '.join(_twice(names))}")
        self.names = tuple(self._entries)
        self._index = {name: index for index, name in enumerate(self.names)}
        self.base = _common_base(entries) if base is None else base
        self.targets: Mapping[str, TargetShape] = MappingProxyType(_common_targets(entries))
        self.problems: Mapping[str, str] = MappingProxyType(dict(problems or {}))
        self._lock = threading.RLock()
        self._stacks: dict[tuple[torch.dtype, torch.device], dict[str, LoraStack]] = {}
        self._donor: Bank | None = None

    @classmethod
    def open(
        cls,
        folder: str | Path | Iterable[str | Path],
        *,
        names: Sequence[str] | None = None,
        base: str | None = None,
        strict: bool = True,
    ) -> Bank:
        """Open a folder of adapters, one adapter, or several of either, reading headers only.

        Args:
            folder: A folder that is an adapter or holds adapter folders; or a list of such.
            names: One name per adapter found, in order; the folders' names by default.
            base: Identifier of the base model; needed only when the adapters name different ones.
            strict: Whether a broken adapter is an error; otherwise it is skipped and recorded in ``problems``.

        Raises:
            AdapterFormatError: Lists the problems of all adapters at once; or nothing is left to open.
            DuplicateNameError: Two adapters have one name.
            IncompatibleError: Different base models, or shapes that disagree.
        """
        given = [folder] if isinstance(folder, str | Path) else list(folder)
        folders = [found for item in given for found in discover(Path(item))]
        if names is not None and len(names) != len(folders):
            raise IncompatibleError(
                f"{len(names)} names for {len(folders)} adapters; give one name per adapter, in order"
            )
        entries: list[Entry] = []
        problems: dict[str, str] = {}
        for position, found in enumerate(folders):
            try:
                adapter_format = format_of(found)
                header = adapter_format.inspect(found, name=None if names is None else names[position])
                entries.append(FileEntry(header, adapter_format))
            except AdapterFormatError as error:
                problems[str(found)] = str(error)
        if strict:
            _raise_problems(problems, len(folders))
        else:
            problems |= _drop_misfits(entries)
        if not entries:
            _raise_problems(problems or {"(none)": "no adapters given"}, len(folders))
        return cls(entries, base=base, problems=problems)

    @classmethod
    def from_index(
        cls,
        index: Index | str | Path,
        *,
        base: str | None = None,
        query: str | None = None,
        names: Sequence[str] | None = None,
        k: int | None = None,
        quarantined: bool = False,
    ) -> Bank:
        """Open adapters that an index knows, reading headers only; their names are those of the index.

        Configurations are compared with the index's hashes at once, weights when they are read: other bytes than the
        index knows are an error.

        Args:
            index: An open index, or its file.
            base: Only adapters of this base model, by its name or its fingerprint.
            query: A text: the best adapters for it, best first.
            names: Exactly these, in this order, instead of a query.
            k: At most so many; with a query 10 by default, without one all.
            quarantined: Also open adapters in quarantine.

        Returns:
            The bank; ``problems`` names adapters that a query found and that have no files (known by description).

        Raises:
            UnknownNameError: The index has no adapter of a name.
            HubIndexError: Nothing is found, an adapter is quarantined, has no files, or its configuration changed.
            AdapterFormatError: Files are missing or damaged, all of them told at once.
            IncompatibleError: Different base models, or shapes that disagree.
        """
        from compose.hub_index.opening import choose, open_chosen

        chosen = choose(index, base=base, query=query, names=names, k=k, quarantined=quarantined)
        found = open_chosen(chosen.adapters)
        _raise_problems(found.problems, len(chosen.adapters))
        return cls(found.entries, base=chosen.base, problems=chosen.without_files)

    @classmethod
    def from_adapters(cls, adapters: Iterable[Adapter], *, base: str | None = None) -> Bank:
        """Make a bank of adapters in memory; they are referenced, not copied, until they are stacked.

        Raises:
            AdapterFormatError: A name that is not allowed, or no adapter.
            DuplicateNameError: Two adapters have one name.
            IncompatibleError: Different base models, or shapes that disagree.
        """
        entries = [MemoryEntry(adapter) for adapter in adapters]
        if not entries:
            raise AdapterFormatError("a bank needs at least one adapter")
        for entry in entries:
            check_name(entry.name, "bank")
        return cls(entries, base=base)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        state = "stacked" if self._stacks else "not loaded"
        return f"Bank({len(self)} adapters, {len(self.targets)} targets, base {self.base!r}, {state})"

    def __getitem__(self, name: str) -> Adapter:
        """Return one adapter: views of the stack once stacked, else read from its file (each time).

        Raises:
            UnknownNameError: No such adapter.
            AdapterFormatError: Its file is damaged or changed since the bank was opened.
        """
        index = self.index(name)
        entry = self._entries[name]
        adapter = entry.resident()
        if adapter is not None:
            return adapter
        stacks = self._exact_stacks()
        return entry.read() if stacks is None else entry.rebuild(self._views(index, stacks))

    def index(self, name: str) -> int:
        """Return the position of ``name``: its row in coefficients and in every stack.

        Raises:
            UnknownNameError: No such adapter.
        """
        if name not in self._index:
            close = difflib.get_close_matches(str(name), self.names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            shown = ", ".join(self.names[:20]) + (f" and {len(self) - 20} more" if len(self) > 20 else "")
            raise UnknownNameError(f"unknown adapter {name!r}; {hint}(known: {shown})")
        return self._index[name]

    def shapes(self, name: str) -> Mapping[str, TargetHeader]:
        """Return one adapter's targets as its header states them: rank, widths, scaling, dtype. Nothing is read.

        Raises:
            UnknownNameError: No such adapter.
        """
        self.index(name)
        return self._entries[name].shapes

    def select(self, names: Iterable[str]) -> Bank:
        """Return a bank of ``names`` in the order given; what is loaded here is not read from files again.

        Raises:
            UnknownNameError: A name is not in this bank.
            DuplicateNameError: A name is given twice.
        """
        chosen = list(names)
        for name in chosen:
            self.index(name)
        if not chosen:
            raise AdapterFormatError("a bank needs at least one adapter")
        bank = Bank([self._entries[name] for name in chosen], base=self.base)
        bank._donor = self
        return bank

    def stack(self, target: str) -> LoraStack:
        """Return the stack of one target, in the adapters' common dtype on the CPU.

        Raises:
            UnknownNameError: No adapter has this target.
        """
        if target not in self.targets:
            close = difflib.get_close_matches(target, self.targets, n=1)
            raise UnknownNameError(
                f"no adapter of the bank has target {target!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        return self.stacks()[target]

    def stacks(self, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> dict[str, LoraStack]:
        """Return every target's stack, ``len(bank)`` entries in each one's ``ranks``, 0 where an adapter misses it.

        Loaded once per (dtype, device) and cached; do not write into the tensors. The first call reads every file once
        straight into the stacks asked for.

        Args:
            dtype: The adapters' common dtype (the one all of theirs promote to) by default.
            device: Where the stacks live.

        Raises:
            AdapterFormatError: Lists every adapter whose file is damaged or changed; the bank is as before.
        """
        key = (self.dtype if dtype is None else dtype, torch.empty(0, device=device).device)
        with self._lock:
            if key not in self._stacks:
                exact = self._exact_stacks()
                with enough_memory(self):
                    self._stacks[key] = self._build(*key) if exact is None else _converted(exact, *key)
            return dict(self._stacks[key])

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype to which all adapters' dtypes promote."""
        dtypes = {shape.dtype for entry in self._entries.values() for shape in entry.shapes.values()}
        result = dtypes.pop()
        for other in dtypes:
            result = torch.promote_types(result, other)
        return result

    @property
    def hashes(self) -> dict[str, str]:
        """Name -> sha256 of the weight file; for adapters in memory, of the file they would make.

        Files not loaded yet are read for it. Once recorded, a hash binds: a later read of other bytes is an error.
        """
        return {name: entry.sha256() for name, entry in self._entries.items()}

    @cached_property
    def _starts(self) -> dict[str, tuple[int, ...]]:
        """First row of every adapter in every target's stack."""
        shapes = [entry.shapes for entry in self._entries.values()]
        return {
            target: (0, *accumulate(one[target].rank if target in one else 0 for one in shapes))
            for target in self.targets
        }

    def _exact_stacks(self) -> dict[str, LoraStack] | None:
        """Return cached stacks that hold every value exactly: the common dtype or float64, on the CPU if possible."""
        wide = self.dtype
        found = [key for key in list(self._stacks) if torch.promote_types(key[0], wide) == key[0]]
        found.sort(key=lambda key: (key[1].type != "cpu", key[0] != wide))
        return self._stacks[found[0]] if found else None

    def _views(self, index: int, stacks: Mapping[str, LoraStack]) -> dict[str, LowRank]:
        """Return one adapter's factors: views, or exact casts back where its dtype is narrower than the stack's."""
        views = {}
        for target, shape in self._entries[self.names[index]].shapes.items():
            stack = stacks[target]
            start = self._starts[target][index]
            rows = slice(start, start + shape.rank)
            a, b = stack.a_RD[rows].to(shape.dtype), stack.b_RO[rows].T.to(shape.dtype)
            views[target] = LowRank(a, b, shape.scaling, shape.kind)
        return views

    def _factors(self, index: int) -> Mapping[str, LowRank]:
        """Return one adapter's factors: from the bank this one was selected from if loaded, else from its file."""
        name = self.names[index]
        donor = self._donor
        while donor is not None:
            stacks = donor._exact_stacks()
            if stacks is not None:
                return donor._views(donor.index(name), stacks)
            donor = donor._donor
        return self._entries[name].read().targets

    def _build(self, dtype: torch.dtype, device: torch.device) -> dict[str, LoraStack]:
        """Allocate one stack per target and fill it adapter by adapter; each file is read once and dropped."""
        entries = list(self._entries.values())
        stacks: dict[str, LoraStack] = {}
        shapes = {target: (self._starts[target][-1], shape.in_features) for target, shape in self.targets.items()}
        a_of = empty_side_by_side(shapes, dtype, device)
        for target, shape in self.targets.items():
            present = [entry.shapes.get(target) for entry in entries]
            ranks = tuple(0 if one is None else one.rank for one in present)
            scaling = torch.tensor([0.0 if one is None else one.scaling for one in present], device=device)
            rows = sum(ranks)
            stacks[target] = LoraStack(
                a_of[target],
                torch.empty(rows, shape.out_features, dtype=dtype, device=device),
                scaling,
                ranks,
            )
        problems: dict[str, str] = {}
        for index, name in enumerate(self.names):
            try:
                factors = self._factors(index)
            except AdapterFormatError as error:
                problems[name] = str(error)
                continue
            for target, update in factors.items():
                rows_of_one = slice(self._starts[target][index], self._starts[target][index] + update.rank)
                stacks[target].a_RD[rows_of_one].copy_(update.a.detach())
                stacks[target].b_RO[rows_of_one].copy_(update.b.detach().T)
        _raise_problems(problems, len(self))
        return stacks


def _converted(stacks: Mapping[str, LoraStack], dtype: torch.dtype, device: torch.device) -> dict[str, LoraStack]:
    shapes = {target: (stack.num_rows, stack.a_RD.shape[1]) for target, stack in stacks.items()}
    a_of = empty_side_by_side(shapes, dtype, device)
    return {
        target: LoraStack(
            a_of[target].copy_(stack.a_RD), stack.b_RO.to(device, dtype), stack.scaling_E.to(device), stack.ranks
        )
        for target, stack in stacks.items()
    }


def _raise_problems(problems: Mapping[str, str], total: int) -> None:
    if not problems:
        return
    shown = list(problems.values())[:_SHOWN_PROBLEMS]
    more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    lines = "".join(f"\n  {line}" for line in shown)
    raise AdapterFormatError(f"{len(problems)} of {total} adapters cannot be loaded:{lines}{more}")


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _common_base(entries: Sequence[Entry]) -> str:
    first = next((entry for entry in entries if entry.base), None)
    if first is None:
        return ""
    for entry in entries:
        if entry.base and entry.base != first.base:
            raise IncompatibleError(
                f"a bank has one base model: {first.name!r} was trained on {first.base!r}, {entry.name!r} on "
                f"{entry.base!r}; give base= if they are the same model under two names, else open them apart"
            )
    return first.base


def _common_targets(entries: Sequence[Entry]) -> dict[str, TargetShape]:
    """Return the union of targets, raising on the first disagreement of each adapter."""
    targets, problems = _union(entries)
    if problems:
        shown = list(problems.values())[:_SHOWN_PROBLEMS]
        raise IncompatibleError("; ".join(shown))
    return {target: targets[target] for target in sorted(targets, key=natural_key)}


def _union(entries: Sequence[Entry]) -> tuple[dict[str, TargetShape], dict[str, str]]:
    """Return the targets' shapes as first seen, and adapter name -> its first disagreement with them."""
    targets: dict[str, TargetShape] = {}
    owners: dict[str, str] = {}
    problems: dict[str, str] = {}
    for entry in entries:
        shapes = {path: TargetShape(one.kind, one.in_features, one.out_features) for path, one in entry.shapes.items()}
        clash = next((path for path, shape in shapes.items() if targets.get(path, shape) != shape), None)
        if clash is not None:
            problems[entry.name] = (
                f"adapter {entry.name!r}, target {clash}: {_describe(shapes[clash])}, but adapter {owners[clash]!r} "
                f"has {_describe(targets[clash])}; they belong to different base models"
            )
            continue
        targets |= shapes
        owners |= dict.fromkeys(shapes.keys() - owners.keys(), entry.name)
    return targets, problems


def _describe(shape: TargetShape) -> str:
    return f"{shape.kind} {shape.in_features} -> {shape.out_features}"


def _drop_misfits(entries: list[Entry]) -> dict[str, str]:
    """Remove adapters whose shapes disagree with earlier ones; return name -> reason."""
    _, problems = _union(entries)
    entries[:] = [entry for entry in entries if entry.name not in problems]
    return problems
