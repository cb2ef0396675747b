"""Options of a merge method, checked against the types its dataclass declares: recipes hold whatever was written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from compose.errors import IncompatibleError

T = TypeVar("T")

_WORDS = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text", NoneType: "left out"}


def build(name: str, kind: type[T], options: Mapping[str, Any]) -> T:
    """Return a method with options.

    Args:
        name: Of the method, for messages.
        kind: Its dataclass.
        options: Field -> value.

    Raises:
        IncompatibleError: It has no such option, or a value is of another type or out of range; the message lists
            what is allowed.
    """
    allowed = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]  # methods are dataclasses
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        known = ", ".join(f"{key}={value!r}" for key, value in allowed.items()) or "none"
        raise IncompatibleError(f"merge method {name!r} has no option {unknown[0]!r}; its options: {known}")
    hints = get_type_hints(kind)
    for key, value in options.items():
        if not _fits(value, hints[key]):
            raise IncompatibleError(
                f"merge method {name!r}: {key} must be {_in_words(hints[key])}, got {value!r:.100}"
            )
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise IncompatibleError(f"merge method {name!r}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that an option may have; other types than those below are not judged."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _WORDS else True


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _in_words(hint: Any) -> str:
    words = _alternatives(hint)
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _alternatives(hint: Any) -> list[str]:
    if get_origin(hint) in (Union, UnionType):
        return [word for one in get_args(hint) for word in _alternatives(one)]
    if get_origin(hint) is Literal:
        return [repr(one) for one in get_args(hint)]
    return [_WORDS.get(hint, str(hint))]
