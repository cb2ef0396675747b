"""JSON without its traps: no duplicate keys, no NaN or Infinity, at most 64 levels, no unbounded numbers."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from compose.errors import AdapterFormatError

MOST_LEVELS = 64
_STEP = "fix it, or get the file again"
_TOO_DEEP = f"JSON nested too deeply; at most {MOST_LEVELS} levels are allowed"


def parse_object(data: bytes, where: object) -> dict[str, Any]:
    """Parse ``data`` as one JSON object.

    Args:
        data: UTF-8 bytes; the caller has bounded their number.
        where: What the bytes are, for messages.

    Raises:
        AdapterFormatError: Not UTF-8, not JSON, not an object, nested deeper than `MOST_LEVELS`, a duplicate key, NaN,
            Infinity or a number beyond float64.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); {_STEP}") from error
    except RecursionError as error:
        raise AdapterFormatError(f"{where}: {_TOO_DEEP}") from error
    except ValueError as error:
        raise AdapterFormatError(f"{where}: not valid JSON: {error}; {_STEP}") from error
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{where}: must be a JSON object, got {type(value).__name__}")
    if not is_shallow(value):
        raise AdapterFormatError(f"{where}: {_TOO_DEEP}")
    return value


def is_shallow(value: Any) -> bool:
    """Return whether a value has at most `MOST_LEVELS` levels of objects and lists.

    What is nested nearly as deep as Python's stack can be parsed, but neither be shown in a message nor written again.
    """
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_LEVELS):
        inner: list[Any] = []
        for item in level:
            inner.extend(item.values() if type(item) is dict else item)
        level = [item for item in inner if type(item) is dict or type(item) is list]
        if not level:
            return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:200]!r}")
    return result


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is beyond float64")
    return value
