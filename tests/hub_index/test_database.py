"""Opening: what is made, what is refused and stays untouched, and errors of SQLite in our words."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from compose.errors import BackendUnavailableError, HubIndexError
from compose.hub_index import database, schema
from compose.hub_index.store import Index


@pytest.fixture
def filled(tmp_path: Path, make_record) -> Path:
    path = tmp_path / "filled.db"
    with Index.open(path, create=True) as index:
        index.add_all(make_record(number) for number in range(40))
    return path


def pragma(index: Index, name: str) -> object:
    return index._connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_settings_of_an_open_index(index) -> None:
    wanted = {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "trusted_schema": 0,
        "cell_size_check": 1,
        "application_id": schema.APPLICATION_ID,
        "user_version": len(schema.STEPS),
    }
    assert {name: pragma(index, name) for name in wanted} == wanted


def test_a_missing_index_is_made_only_when_asked_for_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new folder ? # %20 é" / "hub.db"
    with pytest.raises(HubIndexError, match=r"no such index; make one with create=True"):
        Index.open(path)
    assert not path.parent.exists()
    Index.open(path, create=True).close()
    with Index.open(path) as index:
        assert len(index) == 0
    assert [file.name for file in path.parent.iterdir()] == ["hub.db"]


@pytest.mark.parametrize("content", [b"", b"x", b"SQLite format 3\0", b"SQLite format 4\0" * 99, b"version h" * 99])
def test_a_file_that_is_no_index_is_refused_and_untouched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(content)
    with pytest.raises(HubIndexError):
        Index.open(path, create=bool(content))
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["x.db"]


def test_an_empty_file_becomes_an_index_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "x.db").touch()
    with Index.open(tmp_path / "x.db", create=True) as index:
        assert len(index) == 0


def test_a_file_of_other_software_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE adapter(id)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(HubIndexError, match="a SQLite file of other software"):
        Index.open(path, create=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, make) -> None:
    make(tmp_path / "x.db")
    with pytest.raises(HubIndexError, match="not a regular file"):
        Index.open(tmp_path / "x.db", create=True)


def test_a_newer_index_is_refused_and_untouched(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = filled.read_bytes()
    with pytest.raises(HubIndexError, match=r"schema 99 is newer than 2.*upgrade adapter-compose"):
        Index.open(filled)
    assert filled.read_bytes() == before


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON adapter BEGIN DELETE FROM module; END",
        "CREATE VIEW v AS SELECT * FROM adapter",
        "CREATE TABLE more(x)",
        "DROP INDEX adapter_name",
        "ALTER TABLE module ADD COLUMN more",
    ],
)
def test_a_changed_schema_is_refused(filled: Path, statement: str) -> None:
    connection = sqlite3.connect(filled)
    connection.execute(statement)
    connection.commit()
    connection.close()
    with pytest.raises(HubIndexError, match="says it is an index of schema 2, but differs in"):
        Index.open(filled)


def test_a_truncated_index_is_refused(filled: Path) -> None:
    whole = filled.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 4096, 100, 50):
        filled.write_bytes(whole[:size])
        with pytest.raises(HubIndexError):
            Index.open(filled)
    filled.write_bytes(whole)
    Index.open(filled).close()


def test_damaged_pages_are_an_error_that_says_so_and_check_finds_them(filled: Path) -> None:
    whole = bytearray(filled.read_bytes())
    told = 0
    for page in range(1, len(whole) // 4096):
        damaged = bytearray(whole)
        damaged[page * 4096 : page * 4096 + 4096] = b"\xff" * 4096
        filled.write_bytes(damaged)
        try:
            with Index.open(filled) as index:
                told += index.check() != []
        except HubIndexError as error:
            told += "damaged" in str(error)
    assert told == len(whole) // 4096 - 1


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_network_file_system_is_refused_unless_the_journal_is_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    monkeypatch.setattr(database, "filesystem", lambda folder: "nfs4")
    if journal == "wal":
        with pytest.raises(HubIndexError, match=r'network file system \(nfs4\).*journal="delete"'):
            Index.open(tmp_path / "x.db", create=True)
        return
    with Index.open(tmp_path / "x.db", create=True, journal="delete") as index:
        assert (pragma(index, "journal_mode"), pragma(index, "synchronous")) == ("delete", 3)


def test_an_index_moves_between_the_journals(filled: Path) -> None:
    for journal in ("delete", "wal"):
        with Index.open(filled, journal=journal) as index:
            assert pragma(index, "journal_mode") == journal
            assert len(index) == 40


MOUNTS = r"""22 1 8:1 / / rw - ext4 /dev/sda rw
23 22 0:5 / /home rw,relatime shared:1 master:2 - nfs4 server:/home rw
24 23 0:6 / /home/ann/local\040disk rw - xfs /dev/sdb rw
25 22 0:7 / /mnt rw - tmpfs none rw
26 22 0:8 / /mnt rw - cifs //server/x rw
broken line
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/", "ext4"), ("/home", "nfs4"), ("/home/ann", "nfs4"), ("/home/ann/local disk/x", "xfs"), ("/homes", "ext4"),
     ("/mnt/a", "cifs")],
)  # fmt: skip
def test_the_file_system_is_that_of_the_longest_mount_point(folder: str, kind: str) -> None:
    assert database._type_in(MOUNTS, folder) == kind


def test_this_machines_file_system_is_known(tmp_path: Path) -> None:
    assert (database.filesystem(tmp_path) != "") == Path("/proc/self/mountinfo").exists()


def test_a_locked_index_says_so_after_the_timeout(filled: Path, make_record) -> None:
    with Index.open(filled) as one, Index.open(filled, timeout=0.05) as other:
        one._connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(HubIndexError, match="another process holds the index locked"):
            other.add(make_record(99))
        one._connection.execute("ROLLBACK")
        assert other.add(make_record(99)).state == "added"


@pytest.mark.parametrize(
    ("name", "number"),
    [("SQLITE_FULL", errno.ENOSPC), ("SQLITE_IOERR_WRITE", errno.EIO), ("SQLITE_IOERR_FSYNC", errno.EIO)],
)
def test_a_full_or_failing_disk_is_an_os_error(tmp_path: Path, name: str, number: int) -> None:
    error = sqlite3.OperationalError("disk")
    error.sqlite_errorname = name
    with pytest.raises(OSError, match=str(tmp_path)) as caught, database.told(tmp_path):
        raise error
    assert caught.value.errno == number


def test_an_error_that_is_a_bug_stays_one(index) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"), database.told(index.path):
        index._connection.execute("SELECT * FROM no_table")


def test_a_transaction_that_fails_leaves_the_connection_usable(index, make_record) -> None:
    def stop() -> None:
        index._connection.execute("DELETE FROM adapter")
        raise KeyboardInterrupt

    index.add(make_record(0))
    with pytest.raises(KeyboardInterrupt), database.transaction(index._connection, index.path, write=True):
        stop()
    assert not index._connection.in_transaction
    index.add(make_record(1))
    assert len(index) == 2


def test_an_old_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 30, 1))
    with pytest.raises(BackendUnavailableError, match=r"needs SQLite 3\.31\.0"):
        Index.open(tmp_path / "x.db", create=True)


def test_many_processes_make_one_index(tmp_path: Path) -> None:
    program = (
        "import sys; from compose.hub_index import Index, AdapterRecord\n"
        "with Index.open(sys.argv[1], create=True) as index:\n"
        "    index.add(AdapterRecord(name=f'a{sys.argv[2]}', source='description'))\n"
    )
    path = tmp_path / "hub.db"
    running = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(path), str(number)], stderr=subprocess.PIPE, text=True
        )
        for number in range(6)
    ]
    told = [process.communicate()[1] for process in running]
    assert told == [""] * 6
    with Index.open(path) as index:
        assert len(index) == 6


def test_a_folder_that_cannot_be_written_can_be_read(
    filled: Path, monkeypatch: pytest.MonkeyPatch, make_record
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with Index.open(filled, readonly=True) as index:
        assert index.get(make_record(1).name).title == make_record(1).title
        assert sorted(file.name for file in filled.parent.iterdir()) == [filled.name]
