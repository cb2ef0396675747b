"""Folders of adapters converted from pickled weights, beside their index."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from compose.hub_index.search import Filters

if TYPE_CHECKING:
    from compose.hub_index.store import Index

YOUNG_SECONDS = 3600.0


def converted_folder(index_path: Path) -> Path:
    """Return the folder that holds an index's converted adapters."""
    return index_path.absolute().with_name(index_path.name + ".converted")


def sweep_converted(index: Index, *, dry_run: bool = False) -> list[str]:
    """Delete converted folders that no adapter of the index needs, and return their names.

    Adapters that are removed need none. A folder of the last hour stays: its adapter may be about to be added.
    """
    home = converted_folder(index.path)
    if not home.is_dir():
        return []
    needed = {index.folder_of(one) for one in index.ls(Filters(status="any")) if one.path and one.status != "removed"}
    old = time.time() - YOUNG_SECONDS
    idle = sorted(one for one in home.iterdir() if one not in needed and one.is_dir() and one.stat().st_mtime < old)
    if not dry_run:
        for one in idle:
            shutil.rmtree(one)
    return [one.name for one in idle]
