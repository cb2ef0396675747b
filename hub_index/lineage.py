"""What an adapter was composed of, from the records that Compose leaves beside it: ``merge.json``, ``report.json``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compose.errors import AdapterFormatError
from compose.files.strict_json import parse_object
from compose.hub_index.records import LineageRecord

_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_lineage(folder: Path, read: Callable[[Path], bytes]) -> tuple[tuple[LineageRecord, ...], tuple[str, ...]]:
    """Return the parents of a composed adapter by the hashes of their weight files, and what could not be read.

    Args:
        folder: The adapter's.
        read: Path -> bytes; it refuses what may not be read with an AdapterFormatError, which becomes a note.
    """
    for name, parents_of in (("merge.json", _of_merge), ("report.json", _of_search)):
        path = folder / name
        if not path.exists():
            continue
        try:
            data = read(path)
            fields = parse_object(data, path)
            found = {one.parent_sha256: one for one in parents_of(fields, hashlib.sha256(data).hexdigest())}
        except AdapterFormatError as error:
            return (), (f"lineage not read: {error}",)
        if found:
            return tuple(found.values()), ()
    return (), ()


def _of_merge(fields: Mapping[str, Any], config_sha256: str) -> Iterator[LineageRecord]:
    parents, method = fields.get("parents"), fields.get("method")
    for parent in parents if isinstance(parents, list) else []:
        if isinstance(parent, dict):
            yield from _record(parent.get("sha256"), parent.get("weight"), method, config_sha256)


def _of_search(fields: Mapping[str, Any], config_sha256: str) -> Iterator[LineageRecord]:
    """Yield the adapters with a weight; one whose weight differs between groups of layers has none of its own."""
    bank, weights = fields.get("bank"), fields.get("weights")
    if not isinstance(bank, dict) or not isinstance(weights, dict):
        return
    rows, names, values = bank.get("adapters"), weights.get("adapters"), weights.get("values")
    if not (isinstance(rows, list) and isinstance(names, list) and isinstance(values, list)):
        return
    hashes = {str(row.get("name")): row.get("sha256") for row in rows if isinstance(row, dict)}
    for at, name in enumerate(names):
        column = {row[at] for row in values if isinstance(row, list) and at < len(row) and _is_number(row[at])}
        if any(column):
            weight = next(iter(column)) if len(column) == 1 else None
            yield from _record(hashes.get(str(name)), weight, "few-shot search", config_sha256)


def _record(sha256: Any, weight: Any, method: Any, config_sha256: str) -> Iterator[LineageRecord]:
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
        yield LineageRecord(
            parent_sha256=sha256,
            weight=float(weight) if _is_number(weight) else None,
            method=method[:200] if isinstance(method, str) else "",
            config_sha256=config_sha256,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
