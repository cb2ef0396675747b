"""From an index to the adapters of a bank: which ones are meant, and their headers bound to the hashes it knows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from compose.errors import AdapterFormatError, HubIndexError
from compose.formats import format_of
from compose.formats.entry import FileEntry
from compose.hub_index.records import AdapterRecord, AdapterSummary
from compose.hub_index.search import Filters, is_hash
from compose.hub_index.store import Index

DEFAULT_K = 10
_DEEPER = 4


class Chosen(NamedTuple):
    """What an index was asked for.

    Attributes:
        adapters: With their folders, in order.
        base: Name of their base model where it was asked for; None: the adapters tell.
        without_files: Names that a query found and that are known by description alone -> what to do.
    """

    adapters: Sequence[tuple[AdapterRecord | AdapterSummary, Path]]
    base: str | None
    without_files: Mapping[str, str]


class Opened(NamedTuple):
    """Entries of a bank, and what could not be opened, by name."""

    entries: list[FileEntry]
    problems: Mapping[str, str]


def choose(
    index: Index | str | Path,
    *,
    base: str | None,
    query: str | None,
    names: Sequence[str] | None,
    k: int | None,
    quarantined: bool,
) -> Chosen:
    """Return the adapters that are meant; see `compose.bank.Bank.from_index`.

    Raises:
        UnknownNameError: No adapter of a name.
        HubIndexError: Nothing is found, an adapter is quarantined or known by description alone.
    """
    if names is not None and (query is not None or k is not None):
        raise HubIndexError("names say exactly which adapters; leave query and k out, or names")
    if k is not None and k < 1:
        raise HubIndexError(f"k must be at least 1, got {k}")
    found: Sequence[AdapterRecord | AdapterSummary]
    with nullcontext(index) if isinstance(index, Index) else Index.open(index, readonly=True) as opened:
        if names is not None:
            found = _by_names(opened, names, base, quarantined)
            without: dict[str, str] = {}
        else:
            found, without = _by_query(opened, query, base, k, quarantined)
        adapters = [(one, opened.folder_of(one)) for one in found]
        if not adapters:
            raise HubIndexError(f"{opened.path}: {_nothing(base, query, without)}")
    name = adapters[0][0].base_id if base is not None and is_hash(base) else base
    return Chosen(adapters, name or None, without)


def open_chosen(adapters: Iterable[tuple[AdapterRecord | AdapterSummary, Path]]) -> Opened:
    """Read the headers of adapters and bind their weights to the hashes of the index."""
    entries: list[FileEntry] = []
    problems: dict[str, str] = {}
    for adapter, folder in adapters:
        try:
            entries.append(_entry(adapter, folder))
        except AdapterFormatError as error:
            problems[adapter.name] = f"{adapter.name}: {error}"
    return Opened(entries, problems)


def _by_names(index: Index, names: Sequence[str], base: str | None, quarantined: bool) -> list[AdapterRecord]:
    found = [index.get(name) for name in names]
    for one in found:
        if one.status != "active" and not quarantined:
            reasons = "; ".join(one.reasons) or "no reason is recorded"
            raise HubIndexError(
                f"adapter {one.name!r} is quarantined: {reasons}. To open it anyway pass quarantined=True"
            )
        if base is not None and base not in (one.base_id, one.base_fingerprint):
            raise HubIndexError(
                f"adapter {one.name!r} is of base model {one.base_id!r}, not {base!r}; leave it or base= out"
            )
    return found


def _by_query(
    index: Index, query: str | None, base: str | None, k: int | None, quarantined: bool
) -> tuple[list[AdapterSummary], dict[str, str]]:
    """Return the first ``k`` that have files, and those before them that have none."""
    statuses = ("active", "quarantined") if quarantined else ("active",)
    if query is None:
        ranked = [one for status in statuses for one in index.ls(Filters(base=base, status=status))]
        ranked.sort(key=lambda one: one.name)
    else:
        k = DEFAULT_K if k is None else k
        deep = max(100, _DEEPER * k)
        hits = [hit for status in statuses for hit in index.query(query, base=base, status=status, k=deep)]
        hits.sort(key=lambda hit: -hit.score)
        ranked = [hit.adapter for hit in hits]
    found: list[AdapterSummary] = []
    without: dict[str, str] = {}
    for one in ranked:
        if k is not None and len(found) == k:
            break
        if one.path:
            found.append(one)
        else:
            without[one.name] = f"{one.name}: known by description alone; add its folder to the index to use it"
    return found, without


def _nothing(base: str | None, query: str | None, without: Mapping[str, str]) -> str:
    asked = "".join((f" for {query!r:.120}" if query else "", f" of base model {base!r}" if base else ""))
    more = f"; {len(without)} are known by description alone, add their folders" if without else ""
    return f"no active adapter{asked}{more}. Look with: compose index ls --status any"


def _entry(adapter: AdapterRecord | AdapterSummary, folder: Path) -> FileEntry:
    adapter_format = format_of(folder)
    header = adapter_format.inspect(folder, name=adapter.name)
    sha256 = hashlib.sha256(header.config_text.encode()).hexdigest()
    if adapter.sha256_config and sha256 != adapter.sha256_config:
        raise AdapterFormatError(
            f"{folder}: the configuration has SHA-256 {sha256[:16]}..., the index knows "
            f"{adapter.sha256_config[:16]}...; look with compose index verify, or add it again with --replace"
        )
    return FileEntry(header, adapter_format, adapter.sha256_weights)
