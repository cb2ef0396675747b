"""JSONL files: one JSON object per line, read whole, with the problems of all lines and files told at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from compose.errors import ExamplesError
from compose.files.paths import is_file

T = TypeVar("T")

MAX_FILE_BYTES = 256 * 2**20
_SHOWN_PROBLEMS = 20


class Line(NamedTuple):
    """Where a record stands; as text ``file:number``."""

    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


class BadLineError(Exception):
    """What is wrong with one line, without its place."""


def read_jsonl(
    files: Sequence[Path],
    parse: Callable[[Mapping[str, Any], Line], T],
    *,
    fields: str = "'input' and 'output'",
    max_bytes: int = MAX_FILE_BYTES,
) -> list[T]:
    """Return ``parse(record, line)`` of every line that is not blank, file by file.

    Args:
        files: At most ``max_bytes`` together.
        parse: Raises `BadLineError` for a record that cannot be.
        fields: What a line needs, for the message about a file without lines.
        max_bytes: The limit on their size.

    Raises:
        ExamplesError: A file is missing, too large or empty; or lines are bad, all named with file and number.
    """
    absent = [file for file in files if not is_file(file)]
    raise_problems([f"{file}: no such file; give a JSONL file with one example per line" for file in absent])
    size = sum(file.stat().st_size for file in files)
    if size > max_bytes:
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        raise ExamplesError(f"{files[0]}{more}: {size} bytes, at most {max_bytes}; pass a smaller sample")
    found: list[T] = []
    problems: list[str] = []
    for file in files:
        before = len(found) + len(problems)
        _read_file(file, parse, found, problems)
        if len(found) + len(problems) == before:
            problems.append(f"{file}: no examples; give at least one line with {fields}")
    raise_problems(problems)
    return found


def raise_problems(problems: Sequence[str]) -> None:
    """Raise an `ExamplesError` with the problems, the first 20 in words; nothing where there are none."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise ExamplesError("\n".join([*problems[:_SHOWN_PROBLEMS], *more]))


def _read_file(file: Path, parse: Callable[[Mapping[str, Any], Line], T], found: list[T], problems: list[str]) -> None:
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        line = Line(file, number)
        try:
            found.append(parse(_record(text), line))
        except BadLineError as error:
            problems.append(f"{line}: {error}")


def _record(line: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise BadLineError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadLineError(f"expected an object, got {type(record).__name__}")
    return record
