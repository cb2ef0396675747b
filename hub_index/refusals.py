"""Why an adapter is refused: a word for programs, and a message for people that names the next step."""

from __future__ import annotations

from compose.errors import AdapterFormatError


class AdapterRejectedError(AdapterFormatError):
    """An adapter that is not taken in.

    Attributes:
        code: One word: ``"link"``, ``"pointer"``, ``"pickle"``, ``"config_only"``, ``"kohya"`` ..., or the rule of an
            audit (``"values.finite"``).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: AdapterFormatError) -> str:
    """Return the error's word, ``"format"`` for one that has none: the reader of the format refused the files."""
    return error.code if isinstance(error, AdapterRejectedError) else "format"
