"""Errors a caller can act on; every message says what was wrong, what was given, what is allowed, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_SHOWN_NAMES = 40


class ComposeError(ValueError):
    """Base of every error Compose raises on purpose. The command line prints it on one line and exits with 2."""


class UnknownNameError(ComposeError):
    """A name is not in a registry or a bank."""


class DuplicateNameError(ComposeError):
    """A name is already taken; nothing is ever skipped or replaced silently."""


class AdapterFormatError(ComposeError):
    """An adapter's files are damaged, hostile, incomplete, or of a kind that cannot be represented exactly."""


class IncompatibleError(ComposeError):
    """Values that do not fit together: adapters, a base model, shapes, coefficients."""


class BackendUnavailableError(ComposeError):
    """An explicitly requested backend cannot run here; the message gives the reason."""


class ExamplesError(ComposeError):
    """Problems in a file of examples, all of them, each with file and line."""


class RunFolderError(ComposeError):
    """An output folder exists, is incomplete, or belongs to another run."""


class HubIndexError(ComposeError):
    """An index is missing, foreign, damaged or newer than this version; or a record cannot be in one."""


def unknown_name(what: str, given: str, known: Collection[str]) -> str:
    """Return ``unknown <what> 'tise'; did you mean 'ties'? (known: linear, ties)``; of many names the first 40."""
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = [f"and {len(names) - _SHOWN_NAMES} more"] if len(names) > _SHOWN_NAMES else []
    return f"unknown {what} {given!r}; {hint}(known: {', '.join([*names[:_SHOWN_NAMES], *more]) or 'none'})"
