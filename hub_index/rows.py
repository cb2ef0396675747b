"""Records to rows of the tables and back; every record read is checked again, for the file may be damaged."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from compose.errors import HubIndexError
from compose.hub_index.records import (
    AdapterRecord,
    AdapterSummary,
    AuditFinding,
    EmbeddingRecord,
    ExampleRecord,
    LineageRecord,
    ModuleRecord,
    ScoreRecord,
    StatRecord,
)

ChildKind = Literal["modules", "examples", "scores", "parents", "stats", "findings"]


class ChildTable(NamedTuple):
    """Where the records of one field of `AdapterRecord` are kept."""

    table: str
    record: type[Any]


CHILDREN: dict[str, ChildTable] = {
    "modules": ChildTable("module", ModuleRecord),
    "examples": ChildTable("example", ExampleRecord),
    "scores": ChildTable("score", ScoreRecord),
    "parents": ChildTable("lineage", LineageRecord),
    "stats": ChildTable("stat", StatRecord),
    "findings": ChildTable("audit", AuditFinding),
}
_TEXTS = ("name", "title", "summary", "tags", "datasets")
_FIELDS = tuple(one.name for one in fields(AdapterRecord) if one.name not in CHILDREN and one.name != "embeddings")
_JSON = {one.name for one in fields(AdapterRecord) if str(one.type).startswith(("tuple[str", "Mapping"))}
_TUPLES = {one.name for one in fields(AdapterRecord) if str(one.type).startswith("tuple[str")}
_SUMMARY = tuple(one.name for one in fields(AdapterSummary))
SUMMARY_COLUMNS = ", ".join(f"adapter.{name}" for name in _SUMMARY)


def insert_adapter(connection: sqlite3.Connection, record: AdapterRecord, at: str) -> int:
    """Write a record with all that belongs to it and return its row; ``at`` stands where a time is empty."""
    names = ("sha256", *_FIELDS)
    values = {name: _column(record, name) for name in _FIELDS}
    values |= {"sha256": record.sha256, "added_at": record.added_at or at}
    cursor = connection.execute(
        f"INSERT INTO adapter({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
        [values[name] for name in names],
    )
    row = int(cursor.lastrowid or 0)
    _index_text(connection, row)
    for kind in CHILDREN:
        write_children(connection, row, kind, getattr(record, kind), at)
    write_labels(connection, row, "tag", record.tags)
    write_labels(connection, row, "dataset", record.datasets)
    write_embeddings(connection, row, record.embeddings)
    return row


def delete_adapter(connection: sqlite3.Connection, row: int) -> None:
    """Delete an adapter and all that belongs to it."""
    _index_text(connection, row, command="delete")
    connection.execute("DELETE FROM adapter WHERE id = ?", (row,))


def write_children(
    connection: sqlite3.Connection, row: int, kind: str, records: Sequence[Any], at: str, *, replace: bool = False
) -> None:
    """Write the records of one field; with ``replace`` those that were there go first."""
    table, record = CHILDREN[kind]
    if replace:
        connection.execute(f"DELETE FROM {table} WHERE adapter_id = ?", (row,))
    names = [one.name for one in fields(record)]
    connection.executemany(
        f"INSERT INTO {table}(adapter_id, i, {', '.join(names)}) VALUES (?, ?{', ?' * len(names)})",
        ((row, i, *(_child_value(one, name, at) for name in names)) for i, one in enumerate(records)),
    )
    if kind == "scores":
        write_labels(connection, row, "task", [one.task for one in records], replace=replace)


def write_labels(
    connection: sqlite3.Connection, row: int, kind: str, values: Iterable[str], *, replace: bool = False
) -> None:
    """Write what the adapter is found under by ``task=``."""
    if replace:
        connection.execute("DELETE FROM label WHERE adapter_id = ? AND kind = ?", (row, kind))
    rows = sorted({value.casefold() for value in values})
    connection.executemany(
        "INSERT INTO label(value, kind, adapter_id) VALUES (?, ?, ?)", ((v, kind, row) for v in rows)
    )


def write_embeddings(connection: sqlite3.Connection, row: int, records: Iterable[EmbeddingRecord]) -> None:
    """Write vectors; one of the same encoder and kind is replaced.

    Raises:
        HubIndexError: The index's vectors of this encoder and kind were made otherwise.
    """
    for one in records:
        encoder = _encoder_row(connection, one)
        connection.execute("DELETE FROM embedding WHERE adapter_id = ? AND encoder = ?", (row, encoder))
        stamp = int.from_bytes(hashlib.sha256(one.vector).digest()[:8], "little", signed=True)
        connection.execute(
            "INSERT INTO embedding(adapter_id, encoder, stamp, vec) VALUES (?, ?, ?, ?)",
            (row, encoder, stamp, one.vector),
        )


def read_adapter(connection: sqlite3.Connection, row: int) -> AdapterRecord:
    """Return the record of a row with all that belongs to it.

    Raises:
        HubIndexError: What the row holds is no record; the index is damaged.
    """
    values = connection.execute(f"SELECT {', '.join(_FIELDS)} FROM adapter WHERE id = ?", (row,)).fetchone()
    found: dict[str, Any] = {name: _value(name, value) for name, value in zip(_FIELDS, values, strict=True)}
    for kind in CHILDREN:
        found[kind] = read_children(connection, kind, [row]).get(row, ())
    vectors = connection.execute(
        "SELECT encoder_id, sha256, kind, prompt, vec FROM embedding JOIN encoder ON encoder.id = embedding.encoder "
        "WHERE adapter_id = ? ORDER BY embedding.id",
        (row,),
    )
    found["embeddings"] = tuple(
        EmbeddingRecord(encoder_id=name, encoder_sha256=sha256, kind=kind, prompt=prompt, vector=vec)
        for name, sha256, kind, prompt, vec in vectors
    )
    return AdapterRecord(**found)


def read_children(connection: sqlite3.Connection, kind: str, rows: Sequence[int]) -> dict[int, tuple[Any, ...]]:
    """Return the records of one field of many adapters, by row; rows without any are missing.

    Raises:
        HubIndexError: What a row holds is no record; the index is damaged.
    """
    table, record = CHILDREN[kind]
    names = [one.name for one in fields(record)]
    flags = [one.name for one in fields(record) if one.type == "bool"]
    found: dict[int, list[Any]] = {}
    cursor = connection.execute(
        f"SELECT adapter_id, {', '.join(names)} FROM {table} "
        "WHERE adapter_id IN (SELECT value FROM json_each(?)) ORDER BY adapter_id, i",
        (json.dumps(list(rows)),),
    )
    for row, *values in cursor:
        one = dict(zip(names, values, strict=True))
        one |= {name: bool(one[name]) for name in flags}
        found.setdefault(row, []).append(record(**one))
    return {row: tuple(records) for row, records in found.items()}


def read_summaries(connection: sqlite3.Connection, rows: Sequence[int]) -> dict[int, AdapterSummary]:
    """Return the summaries of rows."""
    cursor = connection.execute(
        f"SELECT adapter.id, {SUMMARY_COLUMNS} FROM adapter WHERE adapter.id IN (SELECT value FROM json_each(?))",
        (json.dumps(list(rows)),),
    )
    return {row: summary(values) for row, *values in cursor}


def read_names(connection: sqlite3.Connection, rows: Sequence[int], status: str | None = None) -> dict[int, str]:
    """Return the names of rows, of those in a status only where one is given."""
    query = (
        "SELECT id, name FROM adapter WHERE id IN (SELECT value FROM json_each(?)) AND coalesce(?, status) = status"
    )
    return dict(connection.execute(query, (json.dumps(list(rows)), status)).fetchall())


def names_like(connection: sqlite3.Connection, name: str) -> list[str]:
    """Return a few names that a misspelt one may have meant: those around it in the alphabet."""
    query = "SELECT name FROM adapter WHERE status <> 'removed' AND name {} ? ORDER BY name {} LIMIT 10"
    before = connection.execute(query.format("<", "DESC"), (name,)).fetchall()
    after = connection.execute(query.format(">", "ASC"), (name,)).fetchall()
    return [one for (one,) in (*reversed(before), *after)]


def summary(values: Sequence[Any]) -> AdapterSummary:
    """Return the summary of one row of ``SUMMARY_COLUMNS``."""
    return AdapterSummary(**{name: _value(name, value) for name, value in zip(_SUMMARY, values, strict=True)})


def update_columns(connection: sqlite3.Connection, row: int, values: Mapping[str, Any]) -> None:
    """Set columns that are in no text index."""
    for name, value in values.items():
        text = _dump(value) if name in _JSON else value
        connection.execute(f"UPDATE adapter SET {name} = ? WHERE id = ?", (text, row))


def _encoder_row(connection: sqlite3.Connection, one: EmbeddingRecord) -> int:
    """Return the row of the record's encoder, made where it is new."""
    key = (one.encoder_id, one.kind)
    given = (one.encoder_sha256, one.prompt, one.dim)
    found = connection.execute(
        "SELECT id, sha256, prompt, dim FROM encoder WHERE encoder_id = ? AND kind = ?", key
    ).fetchone()
    if found is None:
        cursor = connection.execute(
            "INSERT INTO encoder(encoder_id, kind, sha256, prompt, dim) VALUES (?, ?, ?, ?, ?)", (*key, *given)
        )
        return int(cursor.lastrowid or 0)
    refuse_other_encoder(one, *found[1:])
    return int(found[0])


def refuse_other_encoder(one: EmbeddingRecord, sha256: str, prompt: str, dim: int) -> None:
    """Raise where vectors of the index and ``one`` are of one encoder's name, but not made alike.

    Raises:
        HubIndexError: Another hash, prompt or size; scores between them would mean nothing.
    """
    pairs = (("sha256", sha256, one.encoder_sha256), ("prompt", prompt, one.prompt), ("entries", dim, one.dim))
    wrong = [f"{what} {there!r} in the index, {here!r} given" for what, there, here in pairs if there != here]
    if wrong:
        raise HubIndexError(
            f"encoder {one.encoder_id!r} ({one.kind}) is not the one of the index: {'; '.join(wrong)}. Use that "
            "encoder and prompt; or drop its vectors (Index.forget_encoder) and embed all adapters again"
        )


def _index_text(connection: sqlite3.Connection, row: int, command: str = "") -> None:
    """Enter the row's texts in the text index, or take them out; FTS5 keeps no copy of them."""
    names = ", ".join(_TEXTS)
    head, value = ("adapter_fts, ", "'delete', ") if command == "delete" else ("", "")
    connection.execute(
        f"INSERT INTO adapter_fts({head}rowid, {names}) SELECT {value}id, {names} FROM adapter WHERE id = ?", (row,)
    )


def _column(record: AdapterRecord, name: str) -> Any:
    value = getattr(record, name)
    return _dump(value) if name in _JSON else value


def _dump(value: Any) -> str:
    whole = list(value) if isinstance(value, tuple) else dict(value)
    return json.dumps(whole, ensure_ascii=False, allow_nan=False)


def _value(name: str, value: Any) -> Any:
    if name not in _JSON:
        return value
    try:
        found = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        raise HubIndexError(f"the column {name!r} of a row holds no JSON; the index is damaged") from None
    return tuple(found) if name in _TUPLES and isinstance(found, list) else found


def _child_value(record: Any, name: str, at: str) -> Any:
    value = getattr(record, name)
    return value or at if name == "at" and isinstance(record, AuditFinding) else value
