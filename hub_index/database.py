"""The SQLite file of an index: opened with every check that costs little, and its errors in our words.

The same file may be opened by many processes at once. Every commit is on the disk when it returns (WAL and
``synchronous=FULL``); a process that dies in the middle of a transaction leaves no trace of it.
"""

from __future__ import annotations

import errno
import os
import random
import re
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from compose.errors import BackendUnavailableError, HubIndexError
from compose.hub_index import schema

Journal = Literal["wal", "delete"]

OLDEST_SQLITE = (3, 31, 0)
# WAL needs memory shared by all that open the file, which these do not give (sqlite.org/wal.html).
NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "beegfs", "gpfs", "glusterfs",
    "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse", "fuse.juicefs", "fuse.ceph",
})  # fmt: skip
_MAGIC = b"SQLite format 3\0"
_OCTAL = re.compile(r"\\([0-7]{3})")


def connect(
    path: Path, *, create: bool = False, readonly: bool = False, journal: Journal = "wal", timeout: float = 60.0
) -> sqlite3.Connection:
    """Open ``path`` as an index, made or brought to the newest schema where that is needed and allowed.

    Args:
        path: The file.
        create: Make it, and its folder, where it is missing.
        readonly: Never write. Where the folder cannot be written to either, the file must not be in use by a writer.
        journal: ``"wal"``, or ``"delete"`` for a network file system, where one machine writes at a time.
        timeout: Seconds to wait for another process's transaction.

    Raises:
        HubIndexError: Missing, foreign, damaged or newer; or on a network file system with ``journal="wal"``.
        BackendUnavailableError: SQLite is too old or has no FTS5.
        OSError: The disk is full or failing.
    """
    _check_library()
    fresh = _check_file(path, create and not readonly)
    if journal == "wal" and not readonly and (kind := filesystem(path.parent)) in NETWORK:
        raise HubIndexError(
            f"{path}: lies on a network file system ({kind}), where SQLite's write-ahead log loses data; keep the "
            'index on a local disk, or open it with journal="delete" and let one machine write at a time'
        )
    with told(path):
        connection = _open(path, fresh, readonly, timeout)
    try:
        with told(path):
            _prepare(connection, path, create and not readonly, readonly, journal, timeout)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path, *, write: bool = False) -> Iterator[None]:
    """Run the body as one transaction, undone when it raises; a reading one sees one state of the index throughout.

    Raises:
        HubIndexError: As `told`.
        OSError: As `told`.
    """
    with told(path):
        try:
            _begin(connection, write)
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into ours.

    Raises:
        HubIndexError: The file is damaged, not an index, locked for longer than the timeout, or read-only.
        OSError: The disk is full (ENOSPC) or failing (EIO); what was committed before is untouched.
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or ""
        if name.startswith("SQLITE_FULL"):
            raise OSError(
                errno.ENOSPC, "no space left to write the index; free some and try again", str(path)
            ) from error
        if name.startswith("SQLITE_IOERR"):
            text = f"cannot read or write the index ({name}: a full disk, a limit on file sizes, or a failing disk)"
            raise OSError(errno.EIO, text, str(path)) from error
        reason = _reason(name)
        if reason is None:
            raise
        raise HubIndexError(f"{path}: {reason} ({error})") from error


def filesystem(folder: Path) -> str:
    """Return the type of the file system of ``folder`` (``"ext4"``, ``"nfs4"``), ``""`` where it cannot be told.

    A folder that does not exist yet will lie where its nearest parent does.
    """
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # not Linux
        return ""
    return _type_in(mounts, os.path.realpath(folder))


def _type_in(mounts: str, folder: str) -> str:
    """Look ``folder`` up in the text of ``/proc/self/mountinfo``; of equal mount points the last one counts."""
    best, found = -1, ""
    for line in mounts.splitlines():
        head, _, tail = line.partition(" - ")
        point = _OCTAL.sub(lambda code: chr(int(code[1], 8)), head.split(" ")[4]) if head.count(" ") >= 4 else ""
        inside = point == "/" or folder == point or folder.startswith(point + "/")
        if point and tail and inside and len(point) >= best:
            best, found = len(point), tail.split(" ")[0]
    return found


def _begin(connection: sqlite3.Connection, write: bool) -> None:
    """Begin a transaction; a writing one waits for its turn.

    SQLite's own waiting sleeps up to 100 ms at a time, in which a lock that is held for 5 ms stands idle.
    """
    if not write:
        connection.execute("BEGIN")
        return
    (timeout,) = connection.execute("PRAGMA busy_timeout").fetchone()
    until = time.monotonic() + timeout / 1000
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > until:
                    raise
            time.sleep(random.uniform(0.001, 0.005))
    finally:
        connection.execute(f"PRAGMA busy_timeout = {timeout}")


def _is_busy(error: sqlite3.Error) -> bool:
    return str(getattr(error, "sqlite_errorname", "")).startswith("SQLITE_BUSY")


def _reason(name: str) -> str | None:
    if name.startswith("SQLITE_NOTADB"):
        return "not an index: not a SQLite file, or damaged in its first page"
    if name.startswith("SQLITE_CORRUPT"):
        return "the index is damaged; restore a copy, or make a new one and import its last JSONL export"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "another process holds the index locked; wait for it, or raise the timeout"
    if name.startswith("SQLITE_READONLY"):
        return "the index is opened read-only or may not be written; open it with readonly=False"
    if name.startswith("SQLITE_CANTOPEN"):
        return "cannot be opened: check that its folder exists and may be written"
    return None


def _check_library() -> None:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise BackendUnavailableError(
            f"the index needs SQLite {oldest} or newer, this Python has {sqlite3.sqlite_version}; use a newer Python"
        )


def _check_file(path: Path, create: bool) -> bool:
    """Return whether the file has to be made.

    Raises:
        HubIndexError: It is missing and may not be made, or is no regular file.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            return True
        raise HubIndexError(f"{path}: no such index; make one with create=True (compose index add)") from None
    except OSError as error:
        raise HubIndexError(f"{path}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise HubIndexError(f"{path}: not a regular file; give the path of an index file")
    with path.open("rb") as stream:  # SQLite takes a file of a few bytes for an empty one and writes over it
        if stream.read(len(_MAGIC)) not in (b"", _MAGIC):
            raise HubIndexError(f"{path}: not an index: not a SQLite file; it was not touched. Give another path")
    return False


def _open(path: Path, fresh: bool, readonly: bool, timeout: float) -> sqlite3.Connection:
    mode = "ro" if readonly else "rwc" if fresh else "rw"
    address = f"{path.absolute().as_uri()}?mode={mode}"
    if readonly and not os.access(path.parent, os.W_OK) and not _size(_beside(path, "-wal")):
        address += "&immutable=1"  # WAL would have to make files in a folder that cannot be written
    return sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None)


def _prepare(
    connection: sqlite3.Connection, path: Path, create: bool, readonly: bool, journal: Journal, timeout: float
) -> None:
    """Settings, then who the file is, and only then anything that writes to it."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA cache_size = -65536")
    version = _version(connection, path, create)
    if version:
        schema.check_schema(connection, version, path)
        _check_size(connection, path)
    if version < len(schema.STEPS) and readonly:
        raise HubIndexError(
            f"{path}: schema {version}, this version of compose needs {len(schema.STEPS)}; open it once with "
            "readonly=False, which brings it up to date"
        )
    if not readonly:
        _set_journal(connection, path, journal, timeout)
        connection.execute(f"PRAGMA synchronous = {'FULL' if journal == 'wal' else 'EXTRA'}")
        connection.execute("PRAGMA wal_autocheckpoint = 4000")  # one adapter writes about 26 pages
    if version < len(schema.STEPS):
        _migrate(connection, path, create)


def _version(connection: sqlite3.Connection, path: Path, create: bool) -> int:
    """Return the schema's version, 0 for an empty file that may become an index.

    Raises:
        HubIndexError: It is not an index, or a newer one.
    """
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if not tables and not application and not version:
        if create:
            return 0
        raise HubIndexError(f"{path}: empty, not an index; make one with create=True (compose index add)")
    if application != schema.APPLICATION_ID or version < 1:
        raise HubIndexError(
            f"{path}: a SQLite file of other software (application id {application:#x}), not an index; it was not "
            "touched. Give another path"
        )
    if version > len(schema.STEPS):
        raise HubIndexError(
            f"{path}: schema {version} is newer than {len(schema.STEPS)}, the newest this version of compose knows; "
            "upgrade adapter-compose, or export the index to JSONL with the newer version"
        )
    return int(version)


def _check_size(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a file shorter than its header says; a write-ahead log may hold the rest."""
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    if not _size(_beside(path, "-wal")) and (size := _size(path)) < pages * page_size:
        raise HubIndexError(
            f"{path}: {size:,} bytes, its header says {pages * page_size:,}; the index is truncated. Restore a copy, "
            "or make a new one and import its last JSONL export"
        )


def _set_journal(connection: sqlite3.Connection, path: Path, journal: Journal, timeout: float) -> None:
    """Set the journal's mode; it needs the file alone for a moment, for which SQLite itself does not wait."""
    until = time.monotonic() + timeout
    while True:
        try:
            (mode,) = connection.execute(f"PRAGMA journal_mode = {journal}").fetchone()
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
            continue
        if str(mode).lower() != journal:
            raise HubIndexError(f"{path}: SQLite keeps journal_mode={mode} where {journal} was asked for")
        return


def _migrate(connection: sqlite3.Connection, path: Path, create: bool) -> None:
    with transaction(connection, path, write=True):
        version = _version(connection, path, create)  # another process may have been first
        if version < len(schema.STEPS):
            try:
                schema.migrate(connection, version)
            except sqlite3.OperationalError as error:
                if "no such module: fts5" in str(error):
                    text = "the index needs SQLite with FTS5, which this Python's has not; use another Python build"
                    raise BackendUnavailableError(text) from error
                raise


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
