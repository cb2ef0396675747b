"""Adapter file formats: one module per format, entered in ``FORMATS``; everything else asks the registry.

A format is an object with ``matches``, ``inspect``, ``read`` and ``write`` (`AdapterFormat`). A new format is one new
module in this folder that registers itself; the bank and the law tests find it without being edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compose.errors import AdapterFormatError
from compose.files.paths import is_folder
from compose.formats.header import AdapterFormat, AdapterHeader, FullTensorHeader, TargetHeader
from compose.registry import Registry

__all__ = [
    "FORMATS",
    "AdapterFormat",
    "AdapterHeader",
    "FullTensorHeader",
    "TargetHeader",
    "discover",
    "format_of",
]

FORMATS: Registry[AdapterFormat] = Registry("adapter format", package="compose.formats")


def format_of(folder: Path) -> AdapterFormat:
    """Return the format that recognises ``folder``.

    Raises:
        AdapterFormatError: No format, or more than one, recognises it.
    """
    found = [name for name in FORMATS if FORMATS[name].matches(folder)]
    if len(found) == 1:
        return FORMATS[found[0]]
    known = ", ".join(FORMATS)
    if not found:
        raise AdapterFormatError(f"{folder}: not an adapter folder (known formats: {known})")
    raise AdapterFormatError(
        f"{folder}: more than one format claims this folder: {', '.join(found)}; separate the files"
    )


def discover(folder: Path, formats: Sequence[str] | None = None) -> list[Path]:
    """Return the adapter folders of ``folder``: itself when a format claims it, else its subfolders by name.

    Hidden subfolders (a leading dot) are skipped: unfinished writes live there.

    Args:
        folder: A bank folder or one adapter.
        formats: Names of the formats to ask; all of them by default.

    Raises:
        AdapterFormatError: ``folder`` is not a folder, or holds no adapter.
    """
    names = list(FORMATS) if formats is None else list(formats)
    if not is_folder(folder):
        raise AdapterFormatError(f"{folder}: no such folder; give an adapter folder or a folder of adapter folders")
    if any(FORMATS[name].matches(folder) for name in names):
        return [folder]
    try:
        children = sorted(child for child in folder.iterdir() if is_folder(child) and not child.name.startswith("."))
    except OSError as error:
        raise AdapterFormatError(f"{folder}: cannot be read: {error.strerror}; give another folder") from error
    found = [child for child in children if any(FORMATS[name].matches(child) for name in names)]
    if not found:
        raise AdapterFormatError(
            f"{folder}: neither an adapter nor a folder of adapters (known formats: {', '.join(names)})"
        )
    return found
