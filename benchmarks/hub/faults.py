"""R6: every system call of our file writers fails once, or is where the process dies; SQLite's are cut off."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compose.hub_index import durable
from compose.hub_index.store import Index
from hub.children import Child
from hub.disk_full import FULL, Writer, compare, prepare_writers
from hub.records import make_record, same

CALLS = ("open", "write", "fsync", "close", "replace")
_PAGE, _FRAME = 4096, 4096 + 24


class CountedCalls:
    """Stands for the module ``os`` in `compose.hub_index.durable` and acts at the ``k``-th call, counted from 1.

    ``how`` is ``"fail"`` (raise an error in place of the call), ``"die"`` (end the process in place of the call),
    ``"short"`` (a write writes one byte) or ``"count"``.
    """

    def __init__(self, k: int, how: str, error: int = errno.EIO) -> None:
        self._k, self._how, self._error = k, how, error
        self.log: list[str] = []
        self._folders: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._wrapped(name, real) if name in CALLS else real

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.log.append(f"{name} folder" if name == "fsync" and arguments[0] in self._folders else name)
            if len(self.log) == self._k:
                if self._how == "die":
                    os._exit(9)
                if self._how == "short" and name == "write":
                    return real(arguments[0], bytes(arguments[1][:1]))
                if self._how == "fail":
                    if name == "close":
                        real(*arguments)
                    raise OSError(self._error, "injected")
            found = real(*arguments, **options)
            if name == "open" and Path(arguments[0]).is_dir():
                self._folders.add(found)
            return found

        return call


def fail_every_call(folder: Path) -> dict[str, Any]:
    """Let the k-th call of each writer fail (EIO, ENOSPC), be short, or be where the process dies, for all k."""
    counts = dict.fromkeys(("points", "old_intact", "new_whole", "partial", "leftovers", "unordered"), 0)
    leftovers_of_the_dead = 0
    for writer in prepare_writers(folder).values():
        writer.reset()
        calls = _run(writer, 0, "count")
        counts["unordered"] += not in_order(calls)
        for k in range(1, len(calls) + 1):
            for how, error in (("fail", errno.EIO), ("fail", errno.ENOSPC), ("short", 0)):
                old = writer.reset()
                _run(writer, k, how, error)
                compare(writer, old, counts)
                counts["points"] += 1
            old = writer.reset()
            Child(lambda say, k=k, writer=writer: len(_run(writer, k, "die")) and 0).wait()
            dead = dict.fromkeys(counts, 0)
            compare(writer, old, dead)
            leftovers_of_the_dead += dead.pop("leftovers")
            for name, value in dead.items():
                counts[name] += value
            counts["points"] += 1
    return {**counts, "left_by_the_dead": leftovers_of_the_dead}


def in_order(calls: list[str]) -> bool:
    """Return whether the file is synced after its last write, renamed after that, and the folder synced after that."""
    last = {call: place for place, call in enumerate(calls)}
    order = [last.get(call, -1) for call in ("write", "fsync", "replace", "fsync folder")]
    return min(order) >= 0 and order == sorted(order)


def cut_off_sqlite(folder: Path, every: int = 1) -> dict[str, Any]:
    """Interrupt one ``add`` after each ``every`` steps of SQLite's machine; the adapter is there whole or not."""
    counts = dict.fromkeys(("points", "interrupted", "half", "corrupt", "unusable"), 0)
    path = folder / "cut.db"
    with Index.open(path, create=True) as index:
        index.add_all(make_record(number) for number in range(10))
        connection = index._connection
        record, point = make_record(10), 0
        while True:
            point += 1
            connection.set_progress_handler(_after(point), every)
            try:
                index.add(record)
            except sqlite3.OperationalError as error:
                counts["interrupted"] += "interrupt" in str(error)
            finally:
                connection.set_progress_handler(None, 0)
            there = record.name in index
            counts["points"] += 1
            if there:
                break
            counts["half"] += _rows_of(connection) != 10
        counts["half"] += not same(index.get(record.name), record)
        counts["corrupt"] += len(index.check())
        index.add(make_record(11))
        counts["unusable"] += len(index) != 12
    return counts


def fail_every_page(folder: Path) -> dict[str, Any]:
    """Let one ``add`` fail at its k-th page of the write-ahead log, for all k, and the checkpoint after it too."""
    counts = dict.fromkeys(("points", "failed", "lost", "half", "corrupt"), 0)
    whole = folder / "pages.db"
    with Index.open(whole, create=True) as index:
        index.add_all(make_record(number) for number in range(10))
    k, passed = 0, False
    while not passed:
        path = folder / f"pages-{k}.db"
        shutil.copy(whole, path)
        ended = Child(_add_one(path, 32 + k * _FRAME + _PAGE // 2)).wait()
        counts["points"] += 1
        counts["failed"] += ended.code == FULL
        with Index.open(path) as index:
            there = make_record(10).name in index
            counts["lost"] += bool(ended.said) and not there
            counts["half"] += there and not same(index.get(make_record(10).name), make_record(10))
            counts["corrupt"] += len(index.check())
        passed = ended.code == 0
        k += 1
        path.unlink()
    return counts


def _run(writer: Writer, k: int, how: str, error: int = errno.EIO) -> list[str]:
    """Run a writer under `CountedCalls` and return the names of its calls."""
    counted = CountedCalls(k, how, error)
    durable.os = counted  # type: ignore[assignment]
    logging.disable(logging.WARNING)  # the copy of vectors is optional: its writer warns and goes on
    try:
        writer.write()
    except OSError:
        pass
    finally:
        durable.os = os
        logging.disable(logging.NOTSET)
    return counted.log


def _after(point: int) -> Callable[[], int]:
    left = point

    def step() -> int:
        nonlocal left
        left -= 1
        return left == 0

    return step


def _rows_of(connection: sqlite3.Connection) -> int:
    """Return how many adapters any table knows."""
    tables = ("module", "example", "score", "lineage", "stat", "audit", "embedding", "label")
    known = {row for (row,) in connection.execute("SELECT id FROM adapter")}
    for table in tables:
        known |= {row for (row,) in connection.execute(f"SELECT DISTINCT adapter_id FROM {table}")}
    return len(known)


def _add_one(path: Path, limit: int) -> Callable[[Callable[[str], None]], int]:
    def work(say: Callable[[str], None]) -> int:
        with Index.open(path) as index:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                index.add(make_record(10))
            except OSError:
                return FULL
            say("10")
        return 0

    return work
