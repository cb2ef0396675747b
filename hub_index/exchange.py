"""Indexes as JSONL, one adapter per line: the form to give away, for a SQLite file from elsewhere is hostile input.

A line is ``{"schema": 1, "sha256": ..., "adapter": {...}}``; the hash is over the adapter's canonical JSON (sorted
keys, no spaces, UTF-8). Fields that hold their default are left out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from compose.errors import DuplicateNameError, ExamplesError, HubIndexError
from compose.hub_index.changes import Added, NamesTakenError
from compose.hub_index.durable import publish_file
from compose.hub_index.records import AdapterRecord, EmbeddingRecord
from compose.hub_index.rows import CHILDREN
from compose.hub_index.search import Filters
from compose.hub_index.store import Index
from compose.text.jsonl import BadLineError, Line, raise_problems, read_jsonl

LINE_SCHEMA = 1
MAX_IMPORT_BYTES = 4 * 2**30
_RECORDS: dict[str, type[Any]] = {name: child.record for name, child in CHILDREN.items()}
_RECORDS["embeddings"] = EmbeddingRecord


def export_jsonl(index: Index, path: str | Path, filters: Filters | None = None) -> int:
    """Write the adapters that pass (all that are not removed by default) to ``path``, whole or not at all.

    Returns:
        How many there were.

    Raises:
        HubIndexError: None passes.
        OSError: The disk is full or failing; what was at ``path`` before is still there.
    """
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for record in index.records(filters or Filters(status="any")):
            if filters is not None or record.status != "removed":
                count += 1
                yield line_of(record)
        if not count:
            raise HubIndexError(f"{index.path}: no adapter to export; loosen the filters")

    publish_file(Path(path), lines())
    return count


def import_jsonl(index: Index, path: str | Path, *, replace: bool = False) -> tuple[Added, ...]:
    """Add the adapters of a file in one transaction: all or none.

    An import is hearsay: hashes, scores and audits are what the file's author says, and paths are of another machine.

    Raises:
        HubIndexError: Bad lines, all of them, each with file and number; or vectors of an encoder that the index has
            otherwise.
        DuplicateNameError: Names that other adapters have, each with file and number.
    """
    path = Path(path)
    where: dict[str, Line] = {}
    try:
        found = read_jsonl(
            [path],
            lambda fields, line: _record(fields, line, where),
            fields="'schema', 'sha256' and 'adapter'",
            max_bytes=MAX_IMPORT_BYTES,
        )
    except ExamplesError as error:
        raise HubIndexError(str(error)) from None
    try:
        return index.add_all(found, replace=replace)
    except NamesTakenError as error:
        taken = [f"{where[name]}: the index has another adapter named {name!r}" for name in error.names]
        try:
            raise_problems([*taken, "nothing was imported; remove those adapters, or pass replace=True"])
        except ExamplesError as told:
            raise DuplicateNameError(str(told)) from None
        raise


def line_of(record: AdapterRecord) -> bytes:
    """Return the line of a record, with its line feed."""
    adapter = _to_json(record)
    whole = {"schema": LINE_SCHEMA, "sha256": _digest(adapter), "adapter": adapter}
    return _canonical(whole) + b"\n"


def record_of(line: Mapping[str, Any]) -> AdapterRecord:
    """Return the record of a parsed line.

    Raises:
        HubIndexError: Of another schema, changed since it was written, or no record.
    """
    schema = line.get("schema")
    if type(schema) is not int or not 1 <= schema <= LINE_SCHEMA:
        newer = "; it is newer, upgrade adapter-compose" if type(schema) is int and schema > LINE_SCHEMA else ""
        raise HubIndexError(f"'schema' must be {LINE_SCHEMA}, got {schema!r:.40}{newer}")
    adapter = line.get("adapter")
    if not isinstance(adapter, dict):
        raise HubIndexError(f"'adapter' must be an object, got {type(adapter).__name__}")
    digest = _digest(adapter)
    if line.get("sha256") != digest:
        raise HubIndexError(f"'sha256' is not that of the adapter ({digest}); the line was changed or cut")
    return _from_json(AdapterRecord, adapter)


def _record(line: Mapping[str, Any], place: Line, where: dict[str, Line]) -> AdapterRecord:
    try:
        record = record_of(line)
    except HubIndexError as error:
        raise BadLineError(str(error)) from None
    if record.name in where:
        raise BadLineError(f"adapter {record.name!r} is also in line {where[record.name].number}")
    where[record.name] = place
    return record


def _digest(adapter: Mapping[str, Any]) -> str:
    try:
        return hashlib.sha256(_canonical(adapter)).hexdigest()
    except (ValueError, RecursionError) as error:  # NaN, half of a surrogate pair, nested too deeply
        raise HubIndexError(f"'adapter' holds what JSON cannot ({error})") from None


def _canonical(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _to_json(record: Any) -> dict[str, Any]:
    found = {}
    for one in fields(record):
        value = getattr(record, one.name)
        empty = one.default_factory() if one.default_factory is not MISSING else one.default
        if empty is MISSING or value != empty:
            found[one.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple):
        return [item if isinstance(item, str) else _to_json(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _from_json(kind: type[Any], found: Mapping[str, Any]) -> Any:
    known = {one.name: one for one in fields(kind)}
    strange = sorted(found.keys() - known.keys())
    if strange:
        raise HubIndexError(f"unknown fields {', '.join(map(repr, strange[:5]))} of {kind.__name__}")
    absent = [name for name, one in known.items() if name not in found and _is_required(one)]
    if absent:
        raise HubIndexError(f"{kind.__name__} needs {', '.join(map(repr, absent))}")
    return kind(**{name: _parsed(name, str(known[name].type), value) for name, value in found.items()})


def _is_required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _parsed(name: str, kind: str, value: Any) -> Any:
    if name in _RECORDS and kind.startswith("tuple["):
        return tuple(_from_json(_RECORDS[name], one) for one in _objects(name, value))
    if kind == "bytes":
        try:
            return base64.b64decode(value, validate=True)
        except (TypeError, ValueError, binascii.Error):
            raise HubIndexError(f"{name!r} must be base64") from None
    return tuple(value) if isinstance(value, list) else value


def _objects(name: str, value: Any) -> Iterable[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise HubIndexError(f"{name!r} must be a list of objects")
    return value
