"""16 paths that lead elsewhere, nowhere or to what is no file, and names that no adapter may have."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from compose.bank import Bank
from compose.formats import format_of
from tests.hostile.adapters import CONFIG_NAME, WEIGHTS_NAME, files_of, lora_tensors, write
from tests.hostile.handmade import Case
from tests.hostile.handmade_safetensors import same_values

GOOD = files_of(lora_tensors())


def _replaced(name: str, put: Callable[[Path], None], reason: str, file: str = WEIGHTS_NAME) -> Case:
    """A case of a sound adapter with something else in the place of one file."""

    def make(folder: Path) -> Path:
        write(folder / "x", GOOD)
        (folder / "x" / file).unlink()
        put(folder / "x" / file)
        return folder / "x"

    return Case(name, make, reason, check=None if reason else same_values)


def _link_to_fifo(path: Path) -> None:
    os.mkfifo(path.parent.parent / "fifo")
    path.symlink_to(path.parent.parent / "fifo")


def _socket(path: Path) -> None:
    """Bound under a short relative name: paths of sockets have at most 107 bytes."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)


def _link_to_sound(path: Path) -> None:
    elsewhere = path.parent.parent / "blob"
    elsewhere.write_bytes(GOOD[WEIGHTS_NAME])
    path.symlink_to(elsewhere)


def _named(name: str, given: str) -> Case:
    def run(folder: Path) -> object:
        return format_of(folder).inspect(folder, name=given)

    return Case(name, lambda folder: write(folder / "x", GOOD), "adapter name .* is not allowed", run)


PATHS = [
    _replaced("weights are a FIFO", os.mkfifo, "not a regular file"),
    _replaced("the configuration is a FIFO", os.mkfifo, "not a regular file", CONFIG_NAME),
    _replaced("weights are a folder", Path.mkdir, "not a regular file|Is a directory"),
    _replaced("weights link to a FIFO", _link_to_fifo, "not a regular file"),
    _replaced("weights link to /dev/zero", lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    _replaced("weights link to themselves", lambda path: path.symlink_to(path), "cannot be opened"),
    _replaced("weights link to nothing", lambda path: path.symlink_to("nothing"), "cannot be opened"),
    _replaced("weights link to /etc/passwd", lambda path: path.symlink_to("/etc/passwd"), "more than the limit"),
    _replaced(
        "the configuration links to /etc/passwd",
        lambda path: path.symlink_to("/etc/passwd"),
        "(?s)^(?!.*root:).*not valid JSON",  # and nothing of the file is shown
        CONFIG_NAME,
    ),
    _replaced("weights are a socket", _socket, "cannot be opened|not a regular file"),
    _replaced("weights link to a sound file", _link_to_sound, ""),
    _named("a name that climbs", "../../x"),
    _named("a name with NUL", "x\0y"),
    _named("a name of 300 characters", "x" * 300),
    Case("a path with NUL", lambda folder: folder / "x\0y", "no such folder", Bank.open),
    Case("a folder called -rf", lambda folder: write(folder / "-rf", GOOD), "adapter name '-rf' is not allowed"),
]
