"""Examples of a task: reading a JSONL file, with every problem reported at once."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.errors import ExamplesError

MAX_FILE_BYTES = 256 * 2**20
_SHOWN_PROBLEMS = 20
_INPUT_NAMES = ("input", "prompt")
_OUTPUT_NAMES = ("output", "response")


@dataclass(frozen=True)
class Example:
    """One input and the response wanted.

    Attributes:
        input: The instruction and its content, before the model's prompt template.
        output: The response, without an end-of-text token.
        choices: The allowed responses of a closed task, ``output`` among them; empty for an open task.
        messages: Chat turns ``({"role", "content"}, ...)`` that stand in for ``input``; empty otherwise.
    """

    input: str
    output: str
    choices: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()


def read_examples(path: str | Path) -> list[Example]:
    """Read one example per line: ``{"input", "output"}``, ``{"prompt", "response"}`` or ``{"messages"}``.

    ``messages`` ends with the assistant's turn, which becomes the output. ``choices`` is optional. Other fields are
    ignored; blank lines are skipped.

    Raises:
        ExamplesError: The file is missing, too large, empty, or has bad lines, which are all named with their number.
    """
    return [example for example, _ in _read(Path(path))]


def read_labelled_examples(
    path: str | Path, names: Sequence[str], *, known: Collection[str] | None = None
) -> dict[str, list[Example]]:
    """Read examples that say whose they are, as `read_examples` does, by label in order of appearance.

    Args:
        path: A JSONL file.
        names: Fields that may hold the label, such as ``("adapter", "task")``; a line has exactly one of them.
        known: Labels that are allowed; None: any.

    Raises:
        ExamplesError: As `read_examples`; or lines without a label, with two, or with one that is not known.
    """
    found: dict[str, list[Example]] = {}
    for example, record in _read(Path(path), lambda record: _label(record, names, known)):
        found.setdefault(_label(record, names, known), []).append(example)
    return found


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over the examples' contents, in order."""
    rows = [[item.input, item.output, item.choices, [dict(turn) for turn in item.messages]] for item in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()


class _BadLineError(Exception):
    """What is wrong with one line."""


def _read(
    file: Path, check: Callable[[Mapping[str, Any]], object] = lambda record: None
) -> list[tuple[Example, Mapping[str, Any]]]:
    """Every line's example and whole record; the problems of all lines at once, those of ``check`` too."""
    if not file.is_file():
        raise ExamplesError(f"{file}: no such file; give a JSONL file with one example per line")
    if file.stat().st_size > MAX_FILE_BYTES:
        raise ExamplesError(f"{file}: {file.stat().st_size} bytes, at most {MAX_FILE_BYTES}; pass a smaller sample")
    examples, problems = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
            example = _parse(record)
            check(record)
            examples.append((example, record))
        except _BadLineError as error:
            problems.append(f"{file}:{number}: {error}")
    if problems:
        more = [f"... and {len(problems) - _SHOWN_PROBLEMS} more"] if len(problems) > _SHOWN_PROBLEMS else []
        raise ExamplesError("\n".join([*problems[:_SHOWN_PROBLEMS], *more]))
    if not examples:
        raise ExamplesError(f"{file}: no examples; give at least one line with 'input' and 'output'")
    return examples


def _record(line: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _BadLineError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise _BadLineError(f"expected an object, got {type(record).__name__}")
    return record


def _parse(record: Mapping[str, Any]) -> Example:
    if "messages" in record:
        example = _from_messages(record["messages"])
    else:
        example = Example(_text(record, _INPUT_NAMES), _text(record, _OUTPUT_NAMES))
    if not example.output:
        raise _BadLineError("the output is empty")
    return Example(example.input, example.output, _choices(record, example.output), example.messages)


def _label(record: Mapping[str, Any], names: Sequence[str], known: Collection[str] | None) -> str:
    label = _text(record, names)
    if known is not None and label not in known:
        close = difflib.get_close_matches(label, list(known), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise _BadLineError(f"unknown {' or '.join(names)} {label!r}; {hint}(known: {', '.join(known)})")
    if not label:
        raise _BadLineError(f"its {' or '.join(names)} is empty")
    return label


def _text(record: Mapping[str, Any], names: Sequence[str]) -> str:
    given = [name for name in names if name in record]
    if len(given) != 1:
        found = f"both {' and '.join(map(repr, given))}" if given else f"only {sorted(record)}"
        raise _BadLineError(f"needs exactly one of {' or '.join(map(repr, names))}, has {found}")
    value = record[given[0]]
    if not isinstance(value, str):
        raise _BadLineError(f"{given[0]!r} must be a string, got {type(value).__name__}")
    return value


def _from_messages(messages: Any) -> Example:
    fine = isinstance(messages, list) and len(messages) >= 2
    if not fine or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise _BadLineError("'messages' must be a list of at least two {'role', 'content'} objects with string values")
    if messages[-1]["role"] != "assistant":
        raise _BadLineError(f"the last message must be the assistant's, got role {messages[-1]['role']!r}")
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in messages[:-1])
    return Example(turns[-1]["content"], messages[-1]["content"], (), turns)


def _choices(record: Mapping[str, Any], output: str) -> tuple[str, ...]:
    choices = record.get("choices", [])
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise _BadLineError("'choices' must be a list of strings")
    if choices and (output not in choices or len(set(choices)) != len(choices)):
        raise _BadLineError(f"'choices' must be distinct and contain the output {output!r}")
    return tuple(choices)
