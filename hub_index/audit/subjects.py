"""From what a caller names to what is audited: folders, banks, names of an index; and the adapters to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from compose.adapter import Adapter
from compose.errors import AdapterFormatError, IncompatibleError
from compose.formats import discover, format_of
from compose.hub_index.audit.base_model import BaseModel
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.reference import Member, group_key
from compose.hub_index.audit.statistics import ModuleStatistics
from compose.hub_index.records import AdapterRecord
from compose.hub_index.search import Filters
from compose.hub_index.store import Index


@runtime_checkable
class NamedAdapters(Protocol):
    """What an audit needs of a bank: its names in order, and an adapter by its name."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> Adapter: ...


Target = str | Path | Sequence[str] | Adapter | NamedAdapters


class FromIndex(NamedTuple):
    """Adapters of an index to compare with.

    Attributes:
        members: Those with usable statistics in the index.
        without: How many others of the same bases there are.
    """

    members: tuple[Member, ...] = ()
    without: int = 0


def evidence_of(
    target: Target, index: Index | None, base: BaseModel | None, fingerprint: str, full_modules: bool
) -> list[Evidence]:
    """Return what is to be audited, one entry per adapter.

    A text without a folder of that name is a name of the index. What it took in with whole modules may keep them.

    Raises:
        ComposeError: There is no such folder or name, or the folder holds no adapter.
    """
    if isinstance(target, str | Path):
        found = _from_place(target, index)
    elif isinstance(target, Sequence):
        found = [_from_name(name, index) for name in target]
    elif isinstance(target, Adapter):
        found = [Evidence.of_adapter(target)]
    else:
        found = [Evidence.of_adapter(target[name]) for name in target]
    for one in found:
        one.base, one.fingerprint = base, fingerprint
        one.full_modules = full_modules or (one.record is not None and bool(one.record.modules_to_save))
    return found


def _from_place(target: str | Path, index: Index | None) -> list[Evidence]:
    folder = Path(target)
    if not folder.is_dir() and index is not None and str(target) in index:
        return [_from_name(str(target), index)]
    if not folder.is_dir():
        where = "and no name in the index" if index is not None else "and there is no index; give --index"
        raise AdapterFormatError(f"{str(target)!r:.200}: no such folder, {where}")
    found = discover(folder)
    return [Evidence(one, one.resolve().name if one == folder else one.name) for one in found]


def _from_name(name: str, index: Index | None) -> Evidence:
    if index is None:
        raise AdapterFormatError(f"{name!r:.200} is a name of an index, and there is no index; give --index")
    record = index.get(name)
    return Evidence(index.folder_of(record), record.name, record=record)


def member_of(evidence: Evidence, statistics: Mapping[str, ModuleStatistics]) -> Member:
    """Return an audited adapter as one that others are compared with; in a folder it is read again when needed."""
    adapter = evidence.adapter
    if isinstance(adapter, str):
        raise IncompatibleError(adapter)
    member = Member.of(adapter, statistics)
    if evidence.folder is None:
        return member
    return Member(member.name, member.key, statistics, member.sha256, _reader(evidence.folder, member.sha256))


def members_from_index(index: Index | None, bases: Iterable[str]) -> FromIndex:
    """Return the adapters of an index with one of these base models."""
    if index is None:
        return FromIndex()
    members, without = [], 0
    for base in sorted({base for base in bases if base}):
        for record in index.records(Filters(base=base)):
            if _usable(record):
                members.append(_of_record(index, record))
            else:
                without += 1
    return FromIndex(tuple(members), without)


def _of_record(index: Index, record: AdapterRecord) -> Member:
    known = {one.name: one for one in record.modules}
    statistics = {one.module: ModuleStatistics.of_record(one, known[one.module].rank) for one in record.stats}
    targets = [(name, known[name].out_features, known[name].in_features, known[name].rank) for name in statistics]
    load = _reader(index.folder_of(record), record.sha256_weights) if record.path else None
    return Member(record.name, group_key(record.base_id, targets), statistics, record.sha256_weights, load)


def _usable(record: AdapterRecord) -> bool:
    """Whether the index holds statistics of targets that it knows, none of them of values that are not finite."""
    modules = {one.name for one in record.modules}
    return bool(record.stats) and all(one.module in modules and not one.num_nonfinite for one in record.stats)


def _reader(folder: Path, sha256: str) -> Callable[[], Adapter]:
    def read() -> Adapter:
        adapter = format_of(folder).read(folder, name="sibling")
        if adapter.sha256 != sha256:
            raise AdapterFormatError(f"{folder}: the weights changed since they were audited; audit them again")
        return adapter

    return read
