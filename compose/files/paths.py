"""What lies at a path from a stranger: a name too long, a NUL in it or a folder that may not be read is nothing there.

`pathlib.Path` raises an OSError for some of these.
"""

from __future__ import annotations

import os
from pathlib import Path


def exists(path: Path) -> bool:
    """Return whether there is something, links followed."""
    return os.path.exists(path)  # noqa: PTH110


def is_link(path: Path) -> bool:
    """Return whether the path itself is a link, to something or not."""
    return os.path.islink(path)  # noqa: PTH114


def is_folder(path: Path) -> bool:
    """Return whether there is a folder, links followed."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path) -> bool:
    """Return whether there is a regular file, links followed."""
    return os.path.isfile(path)  # noqa: PTH113
