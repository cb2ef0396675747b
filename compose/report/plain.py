"""Text from strangers, made safe to show: control and direction characters are spelled out."""

from __future__ import annotations

import unicodedata

NONE = "\N{EN DASH}"
"""Stands where there is no value."""

_KEPT = "\n\t"
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def printable(text: str) -> str:
    r"""Return ``text`` with terminal escapes, direction overrides and other invisible characters written as ``\x1b``.

    Newlines and tabs stay; ordinary letters of every script stay.

    Example:
        >>> print(printable("red\x1b[31m"), printable("a\u202eb"), printable("naïve"))
        red\x1b[31m a\u202eb naïve
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(character) for character in text)


def _spelled(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _UNSAFE:
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
