"""The one extension mechanism: a decorator enters an object, a scan of the registry's own folder finds the modules."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from compose.errors import DuplicateNameError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one kind. The folder is scanned on first look-up, never at import.

    Args:
        kind: What the entries are, for error messages ("search strategy").
        package: Dotted name of the package whose modules register entries when imported.

    Example:
        >>> colours: Registry[str] = Registry("colour", package=None)
        >>> _ = colours.register("red")("#f00")
        >>> colours["red"], list(colours)
        ('#f00', ['red'])
    """

    def __init__(self, kind: str, package: str | None) -> None:
        self.kind = kind
        self._package = package
        self._lock = threading.RLock()
        self._scanned = package is None
        self._scanning = False
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument under ``name``.

        Raises:
            DuplicateNameError: The name is taken.
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise DuplicateNameError(f"{self.kind} {name!r} is already registered; choose another name")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        self._scan()
        if name not in self._entries:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            known = ", ".join(sorted(self._entries))
            raise UnknownNameError(f"unknown {self.kind} {name!r}; {hint}(known: {known})")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._scan()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._scan()
        return len(self._entries)

    def _scan(self) -> None:
        if self._scanned:
            return
        with self._lock:  # a second thread waits until the folder is scanned
            if self._scanned or self._scanning:
                return
            self._scanning = True
            try:
                self._import_modules()
                self._scanned = True
            finally:
                self._scanning = False

    def _import_modules(self) -> None:
        if self._package is None:
            return
        package = importlib.import_module(self._package)
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name):
            importlib.import_module(f"{self._package}.{module.name}")
