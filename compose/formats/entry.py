"""One adapter of a bank: what is known of it before its weights are read, and how to get them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from compose.adapter import Adapter, LowRank, Source
from compose.errors import AdapterFormatError
from compose.formats import FORMATS
from compose.formats.header import AdapterFormat, AdapterHeader, TargetHeader


class Entry(Protocol):
    """One adapter of a bank, in a file or in memory. Shared by the banks that `Bank.select` makes."""

    name: str
    base: str
    shapes: Mapping[str, TargetHeader]

    def resident(self) -> Adapter | None:
        """Return the adapter when it needs no reading."""
        ...

    def read(self) -> Adapter:
        """Return the adapter, from its file if need be."""
        ...

    def rebuild(self, targets: Mapping[str, LowRank]) -> Adapter:
        """Return the adapter around factors that are loaded already."""
        ...

    def sha256(self) -> str:
        """Return the hash of the weight file."""
        ...


class MemoryEntry:
    """An adapter in memory."""

    def __init__(self, adapter: Adapter) -> None:
        self.name = adapter.name
        self.base = adapter.base
        self.shapes: Mapping[str, TargetHeader] = {
            path: TargetHeader(
                update.kind,
                update.rank,
                update.in_features,
                update.out_features,
                update.scaling,
                update.a.dtype,
                "",
                "",
            )
            for path, update in adapter.targets.items()
        }
        self._adapter = adapter
        self._sha256 = adapter.sha256

    def resident(self) -> Adapter | None:
        """Return the adapter itself."""
        return self._adapter

    def read(self) -> Adapter:
        """Return the adapter itself."""
        return self._adapter

    def rebuild(self, targets: Mapping[str, LowRank]) -> Adapter:
        """Return the adapter with other factors."""
        return replace(self._adapter, targets=targets)

    def sha256(self) -> str:
        """Return the hash of the file it came from, else of the PEFT weight file it would make."""
        if not self._sha256:
            self._sha256 = FORMATS["peft"].sha256(self._adapter)
        return self._sha256


class FileEntry:
    """An adapter in a folder, known by its header; the hash given, or recorded at its first read, binds later ones."""

    def __init__(self, header: AdapterHeader, adapter_format: AdapterFormat, sha256: str = "") -> None:
        self.name = header.name
        self.base = header.base
        self.shapes: Mapping[str, TargetHeader] = header.targets
        self.header = header
        self._format = adapter_format
        self._sha256 = sha256
        self._lock = threading.Lock()

    def resident(self) -> Adapter | None:
        """Return None: it is in its file."""
        return None

    def read(self) -> Adapter:
        """Read the file.

        Raises:
            AdapterFormatError: Damaged, or not the bytes that were inspected or hashed before.
        """
        adapter = self._format.read(self.header.folder, name=self.name, expected=self.header)
        self._record(adapter.sha256)
        return adapter

    def rebuild(self, targets: Mapping[str, LowRank]) -> Adapter:
        """Return the adapter around loaded factors; full weights, which banks do not hold, are read from the file."""
        if self.header.full_modules:
            return replace(self.read(), targets=targets)
        source = Source(self.header.config_text, tuple(self.header.targets))
        return Adapter(self.name, self.base, targets, self.header.config, sha256=self._sha256, source=source)

    def sha256(self) -> str:
        """Return the hash that was given or recorded, reading the file for it if there is none yet."""
        return self._sha256 or self._record(self._format.file_sha256(self.header))

    def _record(self, sha256: str) -> str:
        with self._lock:
            if self._sha256 and self._sha256 != sha256:
                raise AdapterFormatError(
                    f"{self.header.folder}: the weights changed on disk (sha256 was {self._sha256[:12]}…, is "
                    f"{sha256[:12]}…); open the bank again, or add the adapter to its index again"
                )
            self._sha256 = sha256
        return sha256
