"""What a format tells about an adapter before any weight byte is read, and the interface of a format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from compose.adapter import Adapter, TargetKind
from compose.errors import AdapterFormatError

SAVE_AGAIN = "save the adapter again, or correct its configuration"
"""What to do about a configuration and tensors that do not belong together."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DIGITS = re.compile(r"(\d+)")


class TargetHeader(NamedTuple):
    """One target as the file header describes it.

    Attributes:
        kind: ``"linear"`` or ``"embedding"``.
        rank: ``R`` of ``a (R, I)`` and ``b (O, R)``.
        in_features: ``I``.
        out_features: ``O``.
        scaling: The multiplier really applied.
        dtype: Of both factors.
        a_key: Name of the A tensor in the file.
        b_key: Name of the B tensor in the file.
    """

    kind: TargetKind
    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype
    a_key: str
    b_key: str


class FullTensorHeader(NamedTuple):
    """One full replacement weight (PEFT ``modules_to_save``, copies of embeddings) as the file header describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str


@dataclass(frozen=True, eq=False)
class AdapterHeader:
    """An adapter without its weights.

    Attributes:
        name: Its name in a bank; the folder's name unless given.
        folder: Where it lies.
        format: Name of the format in ``FORMATS``.
        base: Identifier of the base model, ``""`` when unknown.
        targets: Module path inside the base model -> `TargetHeader`, in natural order (layer 2 before layer 10).
        full_modules: Parameter path -> `FullTensorHeader`.
        config: The whole source configuration.
        config_text: The configuration file verbatim.
        num_bytes: Size of the weight file.
        fingerprint: Identifies the weight file's header; loading refuses a file whose header differs.
        notes: Remarks a person should see (full modules, unknown configuration fields).
    """

    name: str
    folder: Path
    format: str
    base: str
    targets: Mapping[str, TargetHeader]
    full_modules: Mapping[str, FullTensorHeader]
    config: Mapping[str, Any]
    config_text: str
    num_bytes: int
    fingerprint: str
    notes: tuple[str, ...] = ()


class AdapterFormat(Protocol):
    """A file format of adapters. Implementations keep no state."""

    def matches(self, folder: Path) -> bool:
        """Return whether ``folder`` looks like this format, broken or not."""
        ...

    def inspect(self, folder: Path, *, name: str | None = None) -> AdapterHeader:
        """Read everything but the weights.

        Raises:
            AdapterFormatError: Damaged, hostile, incomplete, or not exactly representable.
        """
        ...

    def read(self, folder: Path, *, name: str | None = None, expected: AdapterHeader | None = None) -> Adapter:
        """Read the adapter whole; with ``expected``, refuse a file whose header changed since it was inspected."""
        ...

    def write(self, adapter: Adapter, folder: Path, *, overwrite: bool = False) -> Path:
        """Write ``folder`` whole or not at all and return it."""
        ...

    def sha256(self, adapter: Adapter) -> str:
        """Return the hash of the weight file that `write` would make of ``adapter``."""
        ...

    def file_sha256(self, header: AdapterHeader) -> str:
        """Return the hash of the weight file's bytes without parsing them."""
        ...


def check_name(name: str, where: object) -> str:
    """Return ``name`` when it may name an adapter.

    Raises:
        AdapterFormatError: Anything but 1-96 of ``A-Z a-z 0-9 . _ -`` starting with a letter or digit, or ``..`` in
            it.
    """
    if _NAME.fullmatch(name) is None or ".." in name:
        raise AdapterFormatError(
            f"{where}: adapter name {name[:120]!r} is not allowed; use 1 to 96 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit and without '..' (rename the folder or give a name)"
        )
    return name


def natural_key(path: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``layers.2`` comes before ``layers.10``."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _DIGITS.split(path) if part)


def join_problems(problems: list[str], limit: int = 8) -> str:
    """Return the first ``limit`` problems in one line, and how many more there are."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more
