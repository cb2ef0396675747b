"""R7: a migration killed at 20 points leaves the old schema or the new one; an older compose refuses a newer file."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compose.errors import HubIndexError
from compose.hub_index import rows, schema
from compose.hub_index.search import Filters
from compose.hub_index.store import Index
from hub.children import Child
from hub.records import make_record, number_of, same

STEPS = schema.STEPS
EVERY = 200


def kill_while_migrating(folder: Path, points: int = 20, adapters: int = 300) -> dict[str, Any]:
    """Kill the migration of a file of schema 1 at ``points`` places of its work, the last ones around its commit."""
    old = folder / "schema-1.db"
    write_schema_1(old, adapters)
    steps = _steps_of_a_migration(old, folder / "measured.db")
    counts = dict.fromkeys(("points", "killed", "old", "new", "unusable", "half", "corrupt", "newer_accepted"), 0)
    for point in range(points):
        path = folder / f"migrating-{point}.db"
        shutil.copy(old, path)
        after = int(steps * (point + 1) / (points - 2)) if point < points - 3 else None
        statement = ("", "COMMIT", "after")[point - (points - 3)] if after is None else ""
        ended = Child(_migrate(path, after, statement)).wait()
        counts["points"] += 1
        counts["killed"] += ended.signal == 9
        _count(path, adapters, counts)
        path.unlink()
    counts["newer_accepted"] += _older_code_opens(folder, old)
    return counts


def write_schema_1(path: Path, adapters: int) -> None:
    """Make an index as schema 1 was: by its step alone, without what schema 2 adds."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN")
    schema.STEPS = STEPS[:1]
    write_labels, rows.write_labels = rows.write_labels, lambda *_, **__: None
    try:
        schema.migrate(connection, 0)
        for number in range(adapters):
            rows.insert_adapter(connection, make_record(number, entries=0), "2026-01-01")
    finally:
        schema.STEPS, rows.write_labels = STEPS, write_labels
    connection.execute("COMMIT")
    connection.close()


def _steps_of_a_migration(old: Path, path: Path) -> int:
    """Return how often SQLite's progress handler is called in one migration."""
    shutil.copy(old, path)
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return 0

    schema.STEPS = (STEPS[0], _watched(lambda connection: connection.set_progress_handler(count, EVERY)))
    try:
        Index.open(path).close()
    finally:
        schema.STEPS = STEPS
    return calls


def _migrate(path: Path, after: int | None, statement: str) -> Callable[[Callable[[str], None]], int]:
    """Return work that migrates and kills itself: after so many calls, at a statement, or right after the commit."""

    def watch(connection: sqlite3.Connection) -> None:
        if after is not None:
            left = after

            def step() -> int:
                nonlocal left
                left -= 1
                if left <= 0:
                    _die()
                return 0

            connection.set_progress_handler(step, EVERY)
        elif statement == "COMMIT":
            connection.set_trace_callback(lambda text: _die() if text == "COMMIT" else None)

    def work(say: Callable[[str], None]) -> int:
        schema.STEPS = (STEPS[0], _watched(watch, die_after=after is None and statement == ""))
        Index.open(path).close()
        _die()
        return 0

    return work


def _watched(
    watch: Callable[[sqlite3.Connection], None], die_after: bool = False
) -> Callable[[sqlite3.Connection], None]:
    def step(connection: sqlite3.Connection) -> None:
        watch(connection)
        STEPS[1](connection)
        if die_after:
            _die()

    return step


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _count(path: Path, adapters: int, counts: dict[str, int]) -> None:
    """Look at what is left with old eyes and with new ones."""
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (labels,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE name LIKE 'label%'").fetchone()
    counts["old"] += version == 1
    counts["new"] += version == 2
    counts["half"] += (version, labels) not in ((1, 0), (2, 2))
    counts["corrupt"] += connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]
    connection.close()
    with Index.open(path) as index:
        names = [one.name for one in index.ls()]
        counts["unusable"] += len(names) != adapters or index.info().schema != 2
        for name in names[:: max(1, adapters // 30)]:
            counts["half"] += not same(index.get(name), make_record(number_of(name), entries=0))
        tag = make_record(0).tags[1]
        wanted = {name for name in names if tag in make_record(number_of(name)).tags}
        counts["half"] += {one.name for one in index.ls(Filters(task=tag))} != wanted
        counts["corrupt"] += len(index.check(records=False))


def _older_code_opens(folder: Path, old: Path) -> bool:
    """Return whether code that knows schema 1 opens a file of schema 2."""
    path = folder / "newer.db"
    shutil.copy(old, path)
    Index.open(path).close()
    before = path.read_bytes()
    schema.STEPS = STEPS[:1]
    try:
        Index.open(path).close()
    except HubIndexError as error:
        return "newer" not in str(error) or path.read_bytes() != before
    finally:
        schema.STEPS = STEPS
    return True
