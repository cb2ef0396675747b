"""A folder of files appears whole or not at all: temporary sibling, fsync, rename."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from compose.errors import DuplicateNameError


def publish_folder(files: Mapping[str, bytes], folder: Path, *, overwrite: bool = False) -> Path:
    """Write ``files`` (name -> content) as ``folder``.

    The files are written and fsynced in a hidden sibling folder that is then renamed. On any failure the sibling is
    removed and what was at ``folder`` before is there again. With ``overwrite`` the old folder is replaced whole,
    other files in it included; a crash between the two renames leaves it as the hidden sibling ``.<name>.old-<id>``.

    Raises:
        DuplicateNameError: ``folder`` exists, and is not an empty folder, without ``overwrite``.
    """
    folder = folder.absolute()
    replaces = folder.exists() or folder.is_symlink()
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if replaces and not overwrite and not empty:
        raise DuplicateNameError(f"{folder} exists; choose another folder or pass overwrite=True")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:12]
    fresh = folder.with_name(f".{folder.name}.tmp-{mark}")
    old = folder.with_name(f".{folder.name}.old-{mark}")
    try:
        fresh.mkdir()
        for name, data in files.items():
            _write_durably(fresh / name, data)
        _sync_folder(fresh)
        _swap_in(fresh, folder, old if replaces else None)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if replaces:
        if old.is_symlink() or old.is_file():
            old.unlink()
        else:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _swap_in(fresh: Path, folder: Path, old: Path | None) -> None:
    """Rename ``folder`` to ``old`` and ``fresh`` to ``folder``; on a failure both are undone."""
    try:
        if old is not None:
            folder.rename(old)
        fresh.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        if not fresh.exists() and folder.exists():
            folder.rename(fresh)
        if old is not None and old.exists():
            old.rename(folder)
        raise


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
