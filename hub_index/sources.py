"""Where adapters lie: one folder, a tree of folders, a snapshot in the cache of Hugging Face.

Walking opens no file. Links to folders are not followed, and refused where they lead out of the tree. Links to files
must stay in the adapter's folder, or in the repository's folder of the cache of Hugging Face, where snapshots link
into ``blobs``. The audit holds to the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compose.errors import HubIndexError
from compose.files import safetensors_file as files
from compose.files.paths import exists, is_file, is_folder
from compose.formats import FORMATS
from compose.hub_index.refusals import AdapterRejectedError

MAX_FOLDERS = 200_000
MAX_DEPTH = 32
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Candidate:
    """A folder that looks like an adapter, broken or not.

    Attributes:
        folder: Absolute; links on the way to it are resolved, a snapshot's folder stays one.
        root: Real path below which links of its files may lead.
        parts: Names from the given folder to this one; empty for itself.
        repo_id: On the Hugging Face Hub, when the folder lies in its cache.
        revision: The snapshot's commit.
    """

    folder: Path
    root: Path
    parts: tuple[str, ...] = ()
    repo_id: str = ""
    revision: str = ""


class Walked(NamedTuple):
    """What a walk found.

    Attributes:
        candidates: In the order of their paths.
        refused: Path -> why it was not looked into.
    """

    candidates: list[Candidate]
    refused: dict[Path, AdapterRejectedError]


class Snapshot(NamedTuple):
    """A folder ``models--ORG--NAME/snapshots/COMMIT`` of the cache of Hugging Face, taken apart."""

    folder: Path
    repo_id: str
    revision: str


def walk(folder: Path) -> Walked:
    """Return the adapters at and below ``folder``; hidden folders are skipped.

    Raises:
        HubIndexError: No such folder, or more folders or levels than are walked.
    """
    start = Path(os.path.realpath(folder))
    if not start.is_dir():
        raise HubIndexError(f"{folder}: no such folder; give an adapter folder or a folder of adapter folders")
    snapshot = snapshot_of(start)
    root = snapshot.folder if snapshot else start
    found, refused = list[Candidate](), dict[Path, AdapterRejectedError]()
    waiting: list[tuple[Path, tuple[str, ...], Snapshot | None]] = [(start, (), snapshot)]
    seen = 0
    while waiting:
        here, parts, inside = waiting.pop()
        seen += 1
        if seen > MAX_FOLDERS or len(parts) > MAX_DEPTH:
            raise HubIndexError(
                f"{folder}: more than {MAX_FOLDERS:,} folders or {MAX_DEPTH} levels; add its parts one by one"
            )
        names, folders = _entries(here, root, refused)
        if looks_like_adapter(here, names):
            where = (inside.repo_id, inside.revision) if inside else ("", "")
            found.append(Candidate(here, inside.folder if inside else here, parts, *where))
        if here.name.startswith("models--") and "snapshots" in folders:
            waiting += [(one, (*parts, one.name), snapshot_of(one)) for one in _chosen_snapshots(here)]
            continue
        waiting += [(here / name, (*parts, name), inside) for name in sorted(folders, reverse=True)]
    return Walked(sorted(found, key=lambda one: one.parts), refused)


def snapshot_of(folder: Path) -> Snapshot | None:
    """Return the snapshot of the cache of Hugging Face that a real path is or lies in; None for any other."""
    for at, part in enumerate(folder.parts):
        commit = folder.parts[at + 1 : at + 2]
        holder = folder.parts[at - 1]
        if part == "snapshots" and holder.startswith("models--") and commit and _COMMIT.fullmatch(commit[0]):
            return Snapshot(Path(*folder.parts[:at]), holder[len("models--") :].replace("--", "/"), commit[0])
    return None


def looks_like_adapter(folder: Path, names: set[str]) -> bool:
    """Return whether a folder with these file names is an adapter of some kind, readable here or not."""
    if any(FORMATS[name].matches(folder) for name in FORMATS):
        return True
    if any(name.startswith("pytorch_lora_weights.") for name in names):  # diffusers
        return True
    if any(name.endswith(".meta") and f"{name[:-5]}.ckpt" in names for name in names):  # mttl
        return True
    loose = [name for name in names if name.endswith(".safetensors")]
    return bool(loose) and not any(name in names for name in ("config.json", "model_index.json", "modules.json"))


def names_of(candidates: list[Candidate]) -> list[str]:
    """Return a name for each: its folder's, or its whole path below the given folder where two folders share theirs.

    A snapshot is called like its repository. Characters that no name may have become ``-``; of a name without any
    other ``""`` is left.
    """
    short = [_short(one) for one in candidates]
    return [
        name if short.count(name) == 1 else _clean(".".join((*_origin(one), *one.parts[_skipped(one) :])) or name)
        for name, one in zip(short, candidates, strict=True)
    ]


def reader(root: Path, most: int = files.MAX_FILE_BYTES) -> Callable[[Path], bytes]:
    """Return a function that reads a regular file of at most ``most`` bytes whose real place is below ``root``.

    The function raises an AdapterFormatError for anything else.
    """

    def read(path: Path) -> bytes:
        check_link(path, root)
        return files.read_bytes(path, max_bytes=most)

    return read


def check_link(path: Path, root: Path) -> None:
    """Refuse a path that leads out of ``root``.

    Raises:
        AdapterRejectedError: Names both.
    """
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise AdapterRejectedError(
            "link", f"{path}: a link that leads out of {root}, to {real}; copy the file there, or remove the link"
        )


def check_links(folder: Path, root: Path) -> None:
    """Refuse a folder with a file that leads out of ``root``, or one that is no regular file.

    Raises:
        AdapterRejectedError: Names the first.
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            path = Path(entry.path)
            if entry.is_symlink():
                check_link(path, root)
            if not is_folder(path) and exists(path) and not is_file(path):
                raise AdapterRejectedError("special", f"{path}: not a regular file; remove it")


def _entries(folder: Path, root: Path, refused: dict[Path, AdapterRejectedError]) -> tuple[set[str], set[str]]:
    """Return the names of files and of folders to walk: no hidden ones, and no links, which are only looked at."""
    names, folders = set[str](), set[str]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    names.add(entry.name)
                elif not entry.name.startswith(".") and not entry.is_symlink():
                    folders.add(entry.name)
                elif not entry.name.startswith(".") and (error := _way_out(Path(entry.path), root)):
                    refused[Path(entry.path)] = error
    except OSError as error:
        refused[folder] = AdapterRejectedError("unreadable", f"{folder}: cannot be listed: {error.strerror}")
    return names, folders


def _way_out(path: Path, root: Path) -> AdapterRejectedError | None:
    try:
        check_link(path, root)
    except AdapterRejectedError as error:
        return error
    return None


def _chosen_snapshots(repository: Path) -> Iterator[Path]:
    """Yield the snapshot that ``main`` points to, or all of them where nothing says which."""
    snapshots = repository / "snapshots"
    try:
        main = (repository / "refs" / "main").read_text(encoding="ascii")[:64].strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    if _COMMIT.fullmatch(main) and (snapshots / main).is_dir():
        yield snapshots / main
        return
    yield from sorted(one for one in snapshots.iterdir() if _COMMIT.fullmatch(one.name) and not one.is_symlink())


def _skipped(one: Candidate) -> int:
    """Return how many of its parts a snapshot's place in the cache takes."""
    return next((at + 1 for at, part in enumerate(one.parts) if part == one.revision), 0) if one.revision else 0


def _origin(one: Candidate) -> tuple[str, ...]:
    return tuple(one.repo_id.split("/")) if one.repo_id else ()


def _short(one: Candidate) -> str:
    below = one.parts[_skipped(one) :]
    if one.repo_id and one.folder.name == one.revision:
        return _clean(_origin(one)[-1])
    return _clean(below[-1] if below else one.folder.name)


def _clean(name: str) -> str:
    """Return the nearest allowed name, ``""`` where nothing of it is left."""
    near = _NO_NAME.sub("-", name).lstrip("._-")
    while ".." in near:
        near = near.replace("..", ".")
    return near[-96:].lstrip("._-")
