"""Where a person's index lies when no path is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "COMPOSE_INDEX"


def default_index() -> Path:
    """Return ``$COMPOSE_INDEX``, or ``adapters.db`` in the user's data folder; neither has to exist.

    The data folder is ``$XDG_DATA_HOME`` or ``~/.local/share``, on macOS ``~/Library/Application Support``, on Windows
    ``%LOCALAPPDATA%``; in it ``adapter-compose``.
    """
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        home = Path.home() / "Library" / "Application Support"
    elif sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return home / "adapter-compose" / "adapters.db"
