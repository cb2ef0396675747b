"""Single files that appear whole or not at all and stay after a power cut: write, fsync, rename, fsync the folder."""

from __future__ import annotations

import hashlib
import os
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compose.errors import HubIndexError

_CHUNK = 2**20
_O_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
TEMPORARY = ".tmp-"


def publish_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write ``path`` anew from ``chunks``; what was there before stays whole until the new file is.

    The order is: write a hidden sibling, fsync it, rename it over ``path``, fsync the folder. On a failure the sibling
    is removed and the old file is still there, unless it is the last step that fails: then the new one is there whole.

    Raises:
        OSError: The disk is full or failing, or the folder cannot be written.
    """
    fresh = path.with_name(f".{path.name}{TEMPORARY}{uuid.uuid4().hex[:12]}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _O_CLOEXEC, 0o644)
    try:
        try:
            for chunk in chunks:
                _write_all(descriptor, chunk)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(fresh, path)  # noqa: PTH105 - the tests count the calls of this module's ``os``
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def file_sha256(path: Path, *, max_bytes: int = 2 * 2**30) -> str:
    """Return the SHA-256 of a regular file's bytes; a FIFO or a device cannot block this.

    Raises:
        HubIndexError: Missing, unreadable, not a regular file, or larger than ``max_bytes``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _O_CLOEXEC)
    except OSError as error:
        raise HubIndexError(f"{path}: cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise HubIndexError(f"{path}: not a regular file")
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        digest, size = hashlib.sha256(), 0
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > max_bytes:
                raise HubIndexError(f"{path}: more than the limit of {max_bytes:,} bytes")
            digest.update(chunk)
    return digest.hexdigest()


def _write_all(descriptor: int, chunk: Any) -> None:
    left = memoryview(chunk).cast("B")
    while left:
        left = left[os.write(descriptor, left) :]


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | _O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
