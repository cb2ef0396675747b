"""What an audit knows of one adapter folder, read piece by piece and only as far as it is safe to read on."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import safetensors
import safetensors.torch
import torch

from compose.adapter import Adapter
from compose.errors import AdapterFormatError
from compose.files import safetensors_file as files
from compose.files.strict_json import parse_object
from compose.formats import format_of
from compose.formats.header import AdapterHeader
from compose.formats.peft_folder import CONFIG_NAME, LEGACY_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from compose.hub_index.audit.raw_header import RawHeader, read_raw_header
from compose.hub_index.audit.tensor_names import Halves, group_halves
from compose.hub_index.sources import snapshot_of

if TYPE_CHECKING:
    from compose.hub_index.audit.base_model import BaseModel
    from compose.hub_index.records import AdapterRecord

MAX_ENTRIES = 10_000
MAX_CARD_BYTES = 2**20
MAX_POINTER_BYTES = 1024
FileKind = Literal["file", "folder", "special", "missing"]


class FileFact(NamedTuple):
    """One entry of the folder, looked at without opening it.

    Attributes:
        name: In the folder.
        kind: Of what it is or leads to; ``"special"`` is a FIFO, a socket or a device.
        size: Bytes.
        link: Where it really lies when it is a symbolic link, else ``""``.
        inside: Whether that is below the folder, or below the cache of Hugging Face that the folder belongs to.
    """

    name: str
    kind: FileKind
    size: int
    link: str = ""
    inside: bool = True


@dataclass(eq=False)
class Evidence:
    """One adapter folder under audit.

    Attributes:
        folder: Where it lies; None for an adapter in memory, which has no files to look at.
        name: What the adapter is called.
        base: The base model it is meant for, when one was given.
        fingerprint: Of the base model, when that is all that was given.
        record: What an index says of it, when it came from there.
        full_modules: Whether weights that replace whole modules are allowed.
        blocked: Whether a finding says that the weight file must not be read.
    """

    folder: Path | None
    name: str
    base: BaseModel | None = None
    fingerprint: str = ""
    record: AdapterRecord | None = None
    full_modules: bool = False
    blocked: bool = field(default=False, init=False)

    @classmethod
    def of_adapter(cls, adapter: Adapter, base: BaseModel | None = None) -> Evidence:
        """Return the evidence of an adapter in memory: its values and its configuration, no files."""
        found = cls(None, adapter.name, base)
        found.__dict__.update(adapter=adapter, config=dict(adapter.config), entries={})
        return found

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of rules that have something to look at."""
        if self.folder is None:
            return "values", "base"
        safe = ("files", "header", "config", "card")
        return safe if self.blocked else (*safe, "tensors", "values", "base")

    def release(self) -> None:
        """Forget the values; they are read again when they are asked for."""
        if self.folder is not None:
            self.__dict__.pop("adapter", None)
            self.__dict__.pop("tensors", None)

    def block(self) -> None:
        """Read no further from the weight file."""
        self.blocked = True

    @cached_property
    def entries(self) -> dict[str, FileFact]:
        """The folder's entries by name, the first `MAX_ENTRIES` of them."""
        if self.folder is None:
            return {}
        root = _allowed_root(self.folder)
        found: dict[str, FileFact] = {}
        with os.scandir(self.folder) as scan:
            for entry in scan:
                if len(found) == MAX_ENTRIES:
                    break
                found[entry.name] = _look(Path(entry.path), root)
        return dict(sorted(found.items()))

    def readable(self, name: str) -> Path | None:
        """Return the path of a regular file that does not lead out of the folder; None for anything else."""
        fact = self.entries.get(name)
        if self.folder is None or fact is None or fact.kind != "file" or not fact.inside:
            return None
        return self.folder / name

    @cached_property
    def weights(self) -> Path | None:
        """The weight file when it may be opened."""
        return self.readable(WEIGHTS_NAME)

    @cached_property
    def config_text(self) -> bytes | None:
        """The configuration's bytes; None where there is none to read."""
        path = self.readable(CONFIG_NAME)
        try:
            return None if path is None else files.read_bytes(path, max_bytes=MAX_CONFIG_BYTES)
        except AdapterFormatError:
            return None

    @cached_property
    def config_problem(self) -> str:
        """Why the configuration is not one strict JSON object, ``""`` when it is."""
        if self.config_text is None:
            return "cannot be read" if self.readable(CONFIG_NAME) else ""
        try:
            parse_object(self.config_text, CONFIG_NAME)
        except AdapterFormatError as error:
            return str(error)
        return ""

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The configuration's fields, read leniently (NaN and double keys pass) so that more can be said of them."""
        try:
            found = json.loads(self.config_text or b"null")
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    @cached_property
    def pointers(self) -> dict[str, str]:
        """Files that are Git LFS pointers -> what to do about them."""
        found = {}
        for name in self.own_files:
            path = self.readable(name)
            if path is not None and self.entries[name].size < MAX_POINTER_BYTES:
                try:
                    files.refuse_pointer(files.read_bytes(path, max_bytes=MAX_POINTER_BYTES), path)
                except AdapterFormatError as error:
                    found[name] = str(error)
        return found

    @cached_property
    def raw(self) -> RawHeader | None:
        """The weight file's header as it stands; None where there is no file to read, or a pointer to one."""
        if self.weights is None or WEIGHTS_NAME in self.pointers:
            return None
        try:
            return read_raw_header(self.weights)
        except AdapterFormatError:
            return None

    @cached_property
    def halves(self) -> dict[str, Halves]:
        """Module path -> its LoRA factors, as the tensor names tell, complete or not."""
        return group_halves(self.raw.tensors if self.raw is not None else ())

    @cached_property
    def strict(self) -> AdapterHeader | str:
        """What the loader makes of the folder without reading values, or why it refuses it."""
        if self.folder is None:
            return "in memory"
        if any(one.kind == "special" or not one.inside for one in self.entries.values()):
            return f"{self.folder}: a link leads out of the folder, or something is no regular file; nothing is read"
        try:
            return format_of(self.folder).inspect(self.folder, name=self.name)
        except AdapterFormatError as error:
            return str(error)

    @cached_property
    def adapter(self) -> Adapter | str:
        """The adapter whole, or why the loader refuses it."""
        if isinstance(self.strict, str) or self.folder is None:
            return str(self.strict)
        try:
            return format_of(self.folder).read(self.folder, name=self.name, expected=self.strict)
        except AdapterFormatError as error:
            return str(error)

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """All tensors of a weight file that is safe to parse, by their names in it, even where the loader refuses it.

        Empty where it is not safe; then there are other findings.
        """
        if self.blocked or self.weights is None:
            return {}
        try:
            return safetensors.torch.load(files.read_bytes(self.weights, max_bytes=files.MAX_FILE_BYTES))
        except (AdapterFormatError, safetensors.SafetensorError):
            return {}

    @cached_property
    def card(self) -> bytes | None:
        """The bytes of ``README.md``; None where there is none to read."""
        path = self.readable("README.md")
        try:
            return None if path is None else files.read_bytes(path, max_bytes=MAX_CARD_BYTES)
        except AdapterFormatError:
            return None

    @property
    def own_files(self) -> tuple[str, ...]:
        """Names of the files that make up the adapter."""
        return CONFIG_NAME, WEIGHTS_NAME, LEGACY_NAME


def _allowed_root(folder: Path) -> Path:
    """Return where links may lead: the folder itself, or the repository in the cache of Hugging Face it lies in."""
    real = Path(os.path.realpath(folder))
    snapshot = snapshot_of(real)
    return snapshot.folder if snapshot is not None else real


def _look(path: Path, root: Path) -> FileFact:
    link = ""
    if path.is_symlink():
        link = os.path.realpath(path)
    try:
        state = path.stat()
    except (OSError, ValueError):
        return FileFact(path.name, "missing", 0, link, not link or Path(link).is_relative_to(root))
    mode = state.st_mode
    kind: FileKind = "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "special"
    return FileFact(path.name, kind, state.st_size, link, not link or Path(link).is_relative_to(root))
