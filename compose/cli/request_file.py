"""``--requests FILE``: one JSON object per line, checked as a whole before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.engine.rows import RowAdapter

MAX_FILE_BYTES = 256 * 2**20
_FIELDS = ("prompt", "adapter", "weights", "id", "max_new_tokens")
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class RequestLine:
    """One record.

    Attributes:
        line: Its line number in the file, from 1.
        prompt: The text.
        adapter: A name, names with weights, or ``None`` for the bare base model; the default where there is none.
        own: Whether the record itself says so.
        max_new_tokens: Longest answer.
        id: What the record calls itself, or ``None``.
    """

    line: int
    prompt: str
    adapter: RowAdapter
    own: bool
    max_new_tokens: int
    id: str | int | None


def read_requests(
    source: str, *, default: RowAdapter, max_new_tokens: int, check: Callable[[RowAdapter], object]
) -> list[RequestLine]:
    """Read every record of a JSONL file.

    A record has ``prompt``; at most one of ``adapter`` (a name, or null for the base model) and ``weights`` (an object
    of names and numbers); and optionally ``id`` and ``max_new_tokens``. Blank lines are skipped.

    Args:
        source: A path, or ``-`` for standard input.
        default: For records with neither ``adapter`` nor ``weights``.
        max_new_tokens: For records without their own.
        check: Raises a ``ComposeError`` for an adapter that cannot be had.

    Raises:
        ComposeError: No such file, no records, or bad ones: all of them, with their line numbers.
    """
    found: list[RequestLine] = []
    problems: list[tuple[int, str]] = []
    lines_of_ids: dict[object, int] = {}
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        try:
            item = _parse(line, number, default, max_new_tokens)
            check(item.adapter)
            if item.id is not None and lines_of_ids.setdefault(item.id, number) != number:
                raise ComposeError(f"the id {item.id!r} is taken by line {lines_of_ids[item.id]}")
            found.append(item)
        except ComposeError as error:
            problems.append((number, str(error)))
    refuse(source, problems)
    if not found:
        raise ComposeError(
            f'--requests {source}: no requests; give one JSON object per line, such as {{"prompt": "a"}}'
        )
    return found


def refuse(source: str, problems: Sequence[tuple[int, str]]) -> None:
    """Raise one error that names all problems (the first twenty in full) with their lines, if there are any.

    Raises:
        ComposeError: There are.
    """
    if not problems:
        return
    shown = [f"{source}:{line}: {text}" for line, text in problems[:_SHOWN_PROBLEMS]]
    more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
    raise ComposeError("\n".join([f"--requests: {len(problems)} bad, nothing was generated", *shown, *more]))


def _lines(source: str) -> list[bytes]:
    if source == "-":
        return sys.stdin.buffer.read().splitlines()
    file = Path(source)
    if not file.is_file():
        raise ComposeError(f"--requests: no such file {source}; give a JSONL file, or - for standard input")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ComposeError(f"--requests {source}: {file.stat().st_size} bytes, at most {MAX_FILE_BYTES}; split it")
    return file.read_bytes().splitlines()


def _parse(line: bytes, number: int, default: RowAdapter, max_new_tokens: int) -> RequestLine:
    from compose.files.strict_json import parse_object

    record = parse_object(line, "the record")
    unknown = sorted(set(record) - set(_FIELDS))
    if unknown:
        raise ComposeError(f"unknown field {unknown[0]!r} (known: {', '.join(_FIELDS)})")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ComposeError(f"'prompt' must be a text that is not empty, got {_shown(prompt)}")
    name = record.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise ComposeError(f"'id' must be a string or a whole number, got {_shown(name)}")
    limit = record.get("max_new_tokens", max_new_tokens)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ComposeError(f"'max_new_tokens' must be a whole number of at least 1, got {_shown(limit)}")
    own = "adapter" in record or "weights" in record
    return RequestLine(number, prompt, _adapter(record) if own else default, own, limit, name)


def _adapter(record: Mapping[str, Any]) -> RowAdapter:
    if "adapter" in record and "weights" in record:
        raise ComposeError("'adapter' and 'weights' exclude each other; give one of them")
    if "adapter" in record:
        if record["adapter"] is not None and not isinstance(record["adapter"], str):
            raise ComposeError(
                f"'adapter' must be a name, or null for the base model, got {_shown(record['adapter'])}"
            )
        return record["adapter"]
    if not isinstance(record["weights"], dict):
        raise ComposeError(f"'weights' must be an object of names and numbers, got {_shown(record['weights'])}")
    return record["weights"]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
