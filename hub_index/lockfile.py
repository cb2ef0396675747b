"""``compose.lock``: a composition pinned by content, so that what was measured is what runs later.

JSON: the versions it was made with, and of every adapter its name, the hashes of its files, where it came from (a
commit, never a branch) and the base model it fits. Checking reads the files again, byte by byte.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import compose
from compose.errors import HubIndexError
from compose.hub_index.durable import file_sha256, publish_file
from compose.hub_index.records import AdapterRecord, AdapterSummary, check_adapter_name, check_sha256, is_text
from compose.hub_index.store import Index

LOCK_NAME = "compose.lock"
LOCK_SCHEMA = 1
MAX_LOCK_BYTES = 64 * 2**20
_MOST_FILES = 64
_LIKELY = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PACKAGES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True, kw_only=True)
class LockedAdapter:
    """One adapter, pinned.

    Attributes:
        name: In the composition.
        sha256: Its identity (`AdapterRecord.sha256`).
        sha256_weights: Of the weight file's bytes.
        sha256_config: Of the configuration file's bytes, ``""`` where there is none.
        weights_file: Name of the weight file in the adapter's folder.
        config_file: Name of the configuration file, ``""`` where there is none.
        repo_id: On the Hub, ``""`` otherwise.
        revision: The commit.
        base_id: The base model as the configuration names it.
        base_fingerprint: Of what the adapter touches of it.
    """

    name: str
    sha256: str
    sha256_weights: str
    sha256_config: str
    weights_file: str
    config_file: str
    repo_id: str = ""
    revision: str = ""
    base_id: str = ""
    base_fingerprint: str = ""

    def __post_init__(self) -> None:
        check_adapter_name(self.name)
        check_sha256(self.sha256, "sha256")
        check_sha256(self.sha256_weights, "sha256_weights")
        check_sha256(self.sha256_config, "sha256_config", empty=True)
        check_sha256(self.base_fingerprint, "base_fingerprint", empty=True)
        for one in fields(self):
            if not is_text(getattr(self, one.name), 4096):
                raise HubIndexError(f"{one.name} must be text, got {getattr(self, one.name)!r:.120}")
        for file in (self.weights_file, self.config_file):
            if "/" in file or "\\" in file or "\0" in file or file in (".", ".."):
                raise HubIndexError(f"{file!r} is not the name of a file in the adapter's folder")


class Lock(NamedTuple):
    """A parsed ``compose.lock``: adapters by name, and package -> version that it was made with."""

    adapters: Mapping[str, LockedAdapter]
    versions: Mapping[str, str]


class Checked(NamedTuple):
    """A lock that holds: where each adapter's files are, and packages whose version is another one now."""

    lock: Lock
    folders: Mapping[str, Path]
    notes: tuple[str, ...]


def lock_adapter(adapter: AdapterRecord | AdapterSummary, folder: str | Path) -> LockedAdapter:
    """Pin an adapter to the files in ``folder``, which must be the ones its record was made of.

    Raises:
        HubIndexError: They are missing or were changed since.
    """
    folder = Path(folder)
    if not adapter.sha256_weights:
        raise HubIndexError(f"adapter {adapter.name!r} is known by description alone; there is nothing to pin")
    found = dict(_files_by_hash(folder, {adapter.sha256_weights, adapter.sha256_config} - {""}))
    wanted = {"weights": adapter.sha256_weights, "configuration": adapter.sha256_config}
    lost = [what for what, sha256 in wanted.items() if sha256 and sha256 not in found]
    if lost:
        raise HubIndexError(
            f"adapter {adapter.name!r}: no file in {folder} has the {' or the '.join(lost)} of its record; it was "
            "changed after it came into the index. Add it again, with replace=True"
        )
    return LockedAdapter(
        name=adapter.name,
        sha256=adapter.sha256,
        sha256_weights=adapter.sha256_weights,
        sha256_config=adapter.sha256_config,
        weights_file=found[adapter.sha256_weights],
        config_file=found.get(adapter.sha256_config, ""),
        repo_id=adapter.repo_id,
        revision=adapter.revision,
        base_id=adapter.base_id,
        base_fingerprint=adapter.base_fingerprint,
    )


def write_lock(path: str | Path, adapters: Iterable[LockedAdapter], versions: Mapping[str, str] | None = None) -> Lock:
    """Write a lock, whole or not at all.

    Args:
        path: The file; by custom ``compose.lock`` beside what was composed.
        adapters: In their order.
        versions: Package -> version; what is installed here by default.

    Raises:
        HubIndexError: Two adapters have one name, or there is none.
        OSError: The disk is full or failing; what was at ``path`` before is still there.
    """
    given = list(adapters)
    named = {one.name: one for one in given}
    if len(named) != len(given) or not named:
        names = [one.name for one in given]
        raise HubIndexError(f"a lock needs adapters with distinct names, got {', '.join(names) or 'none'}")
    lock = Lock(named, dict(installed_versions() if versions is None else versions))
    whole = {
        "schema": LOCK_SCHEMA,
        "versions": dict(lock.versions),
        "adapters": [asdict(one) for one in given],
    }
    publish_file(Path(path), [json.dumps(whole, indent=2, ensure_ascii=False).encode() + b"\n"])
    return lock


def read_lock(path: str | Path) -> Lock:
    """Parse a lock; no adapter is looked at.

    Raises:
        HubIndexError: Missing, no lock, or of a newer schema.
    """
    path = Path(path)
    if not path.is_file():
        raise HubIndexError(f"{path}: no such lock; write one with write_lock")
    if path.stat().st_size > MAX_LOCK_BYTES:
        raise HubIndexError(f"{path}: {path.stat().st_size} bytes, a lock has at most {MAX_LOCK_BYTES}")
    try:
        whole = json.loads(path.read_bytes())
        schema = whole["schema"]
        if type(schema) is int and schema > LOCK_SCHEMA:
            text = f"{path}: lock schema {schema} is newer than {LOCK_SCHEMA}; upgrade adapter-compose"
            raise HubIndexError(text)
        adapters = [LockedAdapter(**one) for one in whole["adapters"]]
        versions = {str(name): str(value) for name, value in whole["versions"].items()}
    except HubIndexError as error:
        raise HubIndexError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubIndexError(f"{path}: not a lock ({type(error).__name__}: {error})") from None
    if len({one.name for one in adapters}) != len(adapters):
        raise HubIndexError(f"{path}: not a lock: an adapter is in it twice")
    return Lock({one.name: one for one in adapters}, versions)


def check_lock(
    path: str | Path, index: Index | None = None, *, folders: Mapping[str, str | Path] | None = None
) -> Checked:
    """Read the files of every pinned adapter again and compare them with the lock.

    Args:
        path: The lock.
        index: Where the adapters are; also their commit and base model are compared.
        folders: Name -> folder, of adapters that are not in the index or lie elsewhere.

    Raises:
        HubIndexError: Adapters are missing or are not the pinned ones: all of them, by name.
    """
    lock = read_lock(path)
    given = {name: Path(folder) for name, folder in (folders or {}).items()}
    found: dict[str, Path] = {}
    problems: list[str] = []
    for name, pinned in lock.adapters.items():
        try:
            found[name] = _check_one(pinned, index, given)
        except HubIndexError as error:
            problems.append(f"adapter {name!r}: {error}")
    if problems:
        raise HubIndexError(
            f"{path}: {len(problems)} of {len(lock.adapters)} adapters are not what was pinned; get those, or write a "
            f"new lock if the change is meant. {'; '.join(problems)}"
        )
    now = installed_versions()
    changed = [(name, then, now.get(name, "missing")) for name, then in lock.versions.items()]
    notes = tuple(f"{name} was {then}, is {here}" for name, then, here in changed if then != here)
    return Checked(lock, found, notes)


def installed_versions() -> dict[str, str]:
    """Return the versions a result depends on: of compose, Python, and the packages that read and run adapters."""
    found = {"adapter-compose": compose.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _check_one(pinned: LockedAdapter, index: Index | None, given: Mapping[str, Path]) -> Path:
    """Return the folder of a pinned adapter whose files are those of the lock."""
    folder = given.get(pinned.name)
    if folder is None:
        if index is None:
            raise HubIndexError("nobody said where it is; pass an index or folders={name: folder}")
        folder = _indexed(pinned, index)
    pairs = [("weights", pinned.weights_file, pinned.sha256_weights)]
    pairs += [("configuration", pinned.config_file, pinned.sha256_config)] if pinned.config_file else []
    for what, file, wanted in pairs:
        if (sha256 := file_sha256(folder / file)) != wanted:
            raise HubIndexError(f"{folder / file}: the {what} has sha256 {sha256[:16]}, pinned is {wanted[:16]}")
    return folder


def _indexed(pinned: LockedAdapter, index: Index) -> Path:
    if pinned.name not in index:
        raise HubIndexError(f"not in {index.path}; add it, or pass its folder")
    record = index.get(pinned.name)
    pairs = [
        (name, getattr(record, name), getattr(pinned, name)) for name in ("sha256", "revision", "base_fingerprint")
    ]
    wrong = [
        f"{name} {here[:16]!r} in the index, pinned is {then[:16]!r}" for name, here, then in pairs if here != then
    ]
    if wrong:
        raise HubIndexError("; ".join(wrong))
    return index.folder_of(record)


def _files_by_hash(folder: Path, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(sha256, name)`` of files in the folder, the likely ones first, until all wanted are found."""
    if not folder.is_dir():
        raise HubIndexError(f"{folder}: no such folder")
    names = sorted(child.name for child in folder.iterdir() if child.is_file() and not child.name.startswith("."))
    order = [*(name for name in _LIKELY if name in names), *(name for name in names if name not in _LIKELY)]
    left = set(wanted)
    for name in order[:_MOST_FILES]:
        if not left:
            return
        sha256 = file_sha256(folder / name)
        left.discard(sha256)
        yield sha256, name
