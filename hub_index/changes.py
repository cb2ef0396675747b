"""Changes of an index inside a write transaction: what becomes of a record, and what can be swept out."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from compose.errors import DuplicateNameError
from compose.hub_index import rows, vectors
from compose.hub_index.durable import TEMPORARY
from compose.hub_index.records import AdapterRecord

_OLD_SECONDS = 3600.0


class NamesTakenError(DuplicateNameError):
    """Other adapters have names that records came with.

    Attributes:
        names: Which.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self.names = tuple(names)
        shown = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        super().__init__(
            f"{path}: other adapters are named {shown}; nothing was added. Give other names, remove those adapters, "
            "or pass replace=True"
        )


class Added(NamedTuple):
    """What became of a record.

    Attributes:
        name: Under which the adapter is in the index now; where it was ``"present"``, maybe not the name given.
        state: ``"added"``, ``"present"`` (the same weights and configuration were there; nothing was written),
            ``"restored"`` (they had been removed) or ``"replaced"``.
    """

    name: str
    state: Literal["added", "present", "restored", "replaced"]


class Swept(NamedTuple):
    """What `Index.gc` deleted, or would: names of adapters, files of vectors, encoders without any vector."""

    adapters: tuple[str, ...]
    files: tuple[str, ...]
    encoders: tuple[str, ...]


def add_all(
    connection: sqlite3.Connection, path: Path, records: Iterable[AdapterRecord], replace: bool, at: str
) -> tuple[Added, ...]:
    """Write records; see `Index.add_all`."""
    done: list[Added] = []
    taken: list[str] = []
    for record in records:
        one = _add(connection, record, replace, at)
        if one is None:
            taken.append(record.name)
        else:
            done.append(one)
    if taken:
        raise NamesTakenError(path, taken)
    return tuple(done)


def sweep(connection: sqlite3.Connection, *, dry_run: bool) -> tuple[tuple[str, ...], list[vectors.Encoder]]:
    """Delete removed adapters and encoders without a vector of others; return their names and the encoders."""
    gone = connection.execute("SELECT id, name FROM adapter WHERE status = 'removed' ORDER BY name, id").fetchall()
    used = "SELECT 1 FROM embedding JOIN adapter ON adapter.id = adapter_id WHERE encoder = ? AND status <> 'removed'"
    known = vectors.encoders(connection)
    idle = [one for one in known if connection.execute(f"{used} LIMIT 1", (one.row,)).fetchone() is None]
    if not dry_run:
        for row, _ in gone:
            rows.delete_adapter(connection, row)
        connection.executemany("DELETE FROM encoder WHERE id = ?", [(one.row,) for one in idle])
    return tuple(name for _, name in gone), idle


def stale_files(connection: sqlite3.Connection, folder: Path, idle: list[vectors.Encoder]) -> list[Path]:
    """Return the copies of vectors that belong to no encoder and base of the index, and unfinished ones."""
    if not folder.is_dir():
        return []
    bases = [None, *(base for (base,) in connection.execute("SELECT DISTINCT base_id FROM adapter"))]
    known = [one for one in vectors.encoders(connection) if one.row not in {other.row for other in idle}]
    keys = {vectors.cache_key(one, base) for one in known for base in bases}
    found = []
    for file in sorted(folder.iterdir()):
        unfinished = TEMPORARY in file.name and file.stat().st_mtime < time.time() - _OLD_SECONDS
        stale = file.suffix == ".npy" and file.name.partition("-")[0] not in keys
        if unfinished or stale:
            found.append(file)
    return found


def _add(connection: sqlite3.Connection, record: AdapterRecord, replace: bool, at: str) -> Added | None:
    """Write one record and say what became of it; None where its name is taken."""
    same = connection.execute("SELECT id, name, status FROM adapter WHERE sha256 = ?", (record.sha256,)).fetchone()
    holder = connection.execute(
        "SELECT id FROM adapter WHERE name = ? AND status <> 'removed'", (record.name,)
    ).fetchone()
    if same and same[2] != "removed" and not replace:
        return Added(same[1], "present")
    if holder and not replace:
        return None
    gone = {one[0] for one in (same, holder) if one}
    for row in gone:
        rows.delete_adapter(connection, row)
    rows.insert_adapter(connection, record, at)
    if not gone:
        return Added(record.name, "added")
    return Added(record.name, "replaced" if replace else "restored")
