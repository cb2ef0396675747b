"""Reading a whole index to find what is wrong with it: pages, references, text index, and every record."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from compose.errors import HubIndexError
from compose.hub_index import rows

_MOST = 20


def problems_of(connection: sqlite3.Connection, *, records: bool = True) -> list[str]:
    """Return what is wrong in the file, ``[]`` where nothing is; the caller holds a transaction.

    Args:
        connection: In a transaction.
        records: Also read every record.

    Raises:
        HubIndexError: It is so damaged that it cannot be read to the end.
    """
    found = [str(text) for (text,) in connection.execute(f"PRAGMA integrity_check({_MOST})")]
    problems = [] if found == ["ok"] else found
    strays = connection.execute("PRAGMA foreign_key_check").fetchall()
    problems += [f"a row of {table} belongs to no adapter" for table, *_ in strays[:_MOST]]
    known = connection.execute("SELECT id, sha256 FROM adapter").fetchall() if records else []
    for row, sha256 in known:
        problems += _record_problems(connection, row, sha256)
    return problems


def text_problems(connection: sqlite3.Connection) -> list[str]:
    """Return whether the text index is not what the adapters' texts say; FTS5 wants a write transaction for this."""
    try:
        connection.execute("INSERT INTO adapter_fts(adapter_fts, rank) VALUES ('integrity-check', 1)")
    except sqlite3.DatabaseError as error:
        return [f"the text index does not fit the adapters ({error})"]
    return []


def _record_problems(connection: sqlite3.Connection, row: int, sha256: str) -> Iterator[str]:
    try:
        record = rows.read_adapter(connection, row)
    except HubIndexError as error:
        yield f"row {row}: {error}"
        return
    if record.sha256 != sha256:
        yield f"adapter {record.name!r}: its identity is not that of its hashes; add it again with replace=True"
