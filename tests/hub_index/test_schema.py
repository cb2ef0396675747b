"""Schemas: an older file is brought up to date in one transaction, whatever happens in the middle."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from compose.errors import HubIndexError
from compose.hub_index import rows, schema
from compose.hub_index.search import Filters
from compose.hub_index.store import Index


@pytest.fixture
def old(tmp_path: Path, make_record, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of schema 1: made by its step alone, without what schema 2 adds."""
    path = tmp_path / "old.db"
    connection = sqlite3.connect(path, isolation_level=None)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "STEPS", schema.STEPS[:1])
        patch.setattr(rows, "write_labels", lambda *_, **__: None)
        connection.execute("BEGIN")
        schema.migrate(connection, 0)
        for number in range(6):
            rows.insert_adapter(connection, make_record(number), "2026-01-01")
        connection.execute("COMMIT")
    connection.close()
    return path


def test_schema_2_finds_by_task_what_schema_1_had(old: Path, make_record, numbered) -> None:
    with Index.open(old) as index:
        assert index.info().schema == 2
        for number in range(6):
            record = make_record(number)
            assert numbered.same(index.get(record.name), record)
            for task in (record.tags[1].upper(), record.datasets[0], record.scores[0].task):
                assert record.name in [one.name for one in index.ls(Filters(task=task))]
        assert index.check() == []


def test_a_migrated_index_is_a_new_one(old: Path, tmp_path: Path) -> None:
    def objects(path: Path) -> set[tuple[str, str]]:
        with Index.open(path, create=True) as index:
            return set(index._connection.execute("SELECT name, sql FROM sqlite_master").fetchall())

    assert objects(old) == objects(tmp_path / "new.db")


def test_an_old_index_is_not_opened_read_only(old: Path) -> None:
    before = old.read_bytes()
    with pytest.raises(HubIndexError, match="open it once with readonly=False"):
        Index.open(old, readonly=True)
    assert old.read_bytes() == before


def test_a_step_that_fails_leaves_the_old_schema(old: Path, monkeypatch: pytest.MonkeyPatch, make_record) -> None:
    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half(x)")
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(schema, "STEPS", (*schema.STEPS, broken))
        with pytest.raises(RuntimeError, match="in the middle"):
            Index.open(old)
    connection = sqlite3.connect(old)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('half', 'label')").fetchone() == (0,)
    connection.close()
    with Index.open(old) as index:
        assert len(index) == 6


def test_a_later_step_is_found_and_an_older_program_refuses_its_file(
    index, make_record, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.add(make_record(1))
    with monkeypatch.context() as patch:
        step: Callable[[sqlite3.Connection], None] = lambda connection: connection.execute("CREATE TABLE more(x)")  # noqa: E731
        patch.setattr(schema, "STEPS", (*schema.STEPS, step))
        with Index.open(index.path) as newer:
            assert newer.info().schema == 3
            assert len(newer) == 1
    with pytest.raises(HubIndexError, match="schema 3 is newer than 2"):
        Index.open(index.path)


def test_the_first_step_is_never_edited() -> None:
    """Files of schema 1 exist; a change to its text would make them look damaged."""
    import hashlib

    assert hashlib.sha256(schema._TABLES.encode()).hexdigest()[:16] == "a983fcd2273e7b12"
    assert hashlib.sha256(schema._LABELS.encode()).hexdigest()[:16] == "11149dda26516888"
