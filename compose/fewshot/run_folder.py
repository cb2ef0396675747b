"""The run folder: unfinished work beside it, the result published whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from compose.errors import RunFolderError
from compose.files.publish import publish_folder

EVENTS = "events.jsonl"


class RunFolder:
    """``OUT`` and, while the search runs, ``OUT.partial`` with the journal.

    Args:
        out: Where the result will be.
        resume: Continue ``OUT.partial``; a missing one is begun.
        force: Replace what is there, finished or not.

    Raises:
        RunFolderError: Something is there, and neither ``resume`` nor ``force`` says what to do with it.
    """

    def __init__(self, out: str | Path, *, resume: bool = False, force: bool = False) -> None:
        self.path = Path(out).absolute()
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._force = force
        if resume and force:
            raise RunFolderError("resume continues a run, force starts again; give one of them")
        if self.path.exists() and not force:
            raise RunFolderError(f"{self.path} exists; choose another folder, or pass --force to replace it")
        if self.partial.exists() and not resume and not force:
            raise RunFolderError(
                f"{self.partial} holds an unfinished run; --resume continues it, --force starts again"
            )

    def begin(self) -> None:
        """Make ``OUT.partial``, empty under ``force``; call it when nothing else can be wrong with the input."""
        if self._force:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True, exist_ok=True)

    @property
    def events(self) -> Path:
        """The journal of the run under way."""
        return self.partial / EVENTS

    def publish(self, files: Mapping[str, bytes]) -> Path:
        """Write the files and the journal as ``OUT`` by one rename, then remove ``OUT.partial``."""
        journal = {EVENTS: self.events.read_bytes()} if self.events.exists() else {}
        publish_folder({**files, **journal}, self.path, overwrite=self._force)
        shutil.rmtree(self.partial)
        return self.path
