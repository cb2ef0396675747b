"""The folder: what lies in it, where links lead, what is missing. Nothing is opened here but possible pointers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from compose.files.safetensors_file import MAX_FILE_BYTES
from compose.formats import FORMATS
from compose.formats.peft_folder import CONFIG_NAME, LEGACY_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from compose.hub_index.audit.evidence import MAX_ENTRIES, Evidence
from compose.hub_index.audit.rule import Remark, rule

_PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_CODE = {".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe"}


@rule("files.link", "critical", hard=True)
def links_stay_inside(evidence: Evidence) -> Iterator[Remark]:
    """A symbolic link leads out of the folder (or out of the Hugging Face cache the folder is a snapshot in)."""
    for fact in evidence.entries.values():
        if not fact.inside:
            yield Remark(f"{fact.name} leads to {fact.link}; copy the file in, or remove the link")


@rule("files.special", "critical", hard=True)
def only_regular_files(evidence: Evidence) -> Iterator[Remark]:
    """A FIFO, a socket or a device: reading it can hang for ever."""
    for fact in evidence.entries.values():
        if fact.kind == "special":
            yield Remark(f"{fact.name} is no regular file; remove it")


@rule("files.missing", "high", hard=True)
def own_files_are_there(evidence: Evidence) -> Iterator[Remark]:
    """A file of the adapter is missing, is a folder, or is a link that leads nowhere."""
    if not _has_other_format(evidence):
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            fact = evidence.entries.get(name)
            if fact is not None and fact.kind in ("missing", "folder"):
                yield Remark(f"{name} is {'a folder' if fact.kind == 'folder' else 'a link that leads nowhere'}")
            elif fact is None and not (name == WEIGHTS_NAME and LEGACY_NAME in evidence.entries):
                yield Remark(f"there is no {name}")


def _has_other_format(evidence: Evidence) -> bool:
    folder = evidence.folder
    return folder is not None and any(FORMATS[name].matches(folder) for name in FORMATS if name != "peft")


@rule("files.pointer", "high", hard=True)
def no_pointers(evidence: Evidence) -> Iterator[Remark]:
    """A Git LFS pointer lies where a file should be."""
    for message in evidence.pointers.values():
        yield Remark(message)


@rule("files.size", "high", hard=True)
def sizes_are_bounded(evidence: Evidence) -> Iterator[Remark]:
    """A file is larger than anything that is read."""
    for name, most in ((WEIGHTS_NAME, MAX_FILE_BYTES), (CONFIG_NAME, MAX_CONFIG_BYTES)):
        fact = evidence.entries.get(name)
        if fact is not None and fact.kind == "file" and fact.size > most:
            yield Remark(f"{name} has {fact.size:,} bytes, more than the limit of {most:,}")


@rule("files.pickle", "high", hard=True)
def weights_are_not_only_pickled(evidence: Evidence) -> Iterator[Remark]:
    """The weights are there only as a pickle, which can run code."""
    if WEIGHTS_NAME not in evidence.entries and LEGACY_NAME in evidence.entries:
        yield Remark(f"{LEGACY_NAME} can run code when it is loaded and is not read; convert it if you trust it")


@rule("files.pickle-beside", "medium")
def no_pickles_beside(evidence: Evidence) -> Iterator[Remark]:
    """Pickled files beside the weights: other programs may load them."""
    if WEIGHTS_NAME in evidence.entries:
        for name in evidence.entries:
            if PurePath(name).suffix.lower() in _PICKLED:
                yield Remark(f"{name} can run code in programs that load it; an adapter does not need it")


@rule("files.code", "medium")
def no_code(evidence: Evidence) -> Iterator[Remark]:
    """Code beside the weights: an adapter needs none, and nothing here runs it."""
    for name in evidence.entries:
        if PurePath(name).suffix.lower() in _CODE:
            yield Remark(f"{name} is code; do not run it (trust_remote_code) unless you have read it")


@rule("files.many", "medium")
def not_too_many(evidence: Evidence) -> Iterator[Remark]:
    """More entries in the folder than an audit looks at."""
    if len(evidence.entries) >= MAX_ENTRIES:
        yield Remark(f"the folder has {MAX_ENTRIES:,} entries or more; only so many were looked at")
