"""Examples of a task: reading a JSONL file, with every problem reported at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.errors import unknown_name
from compose.text.jsonl import BadLineError, read_jsonl

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
    return read_jsonl([Path(path)], lambda record, line: parse_example(record))


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
    lines = read_jsonl([Path(path)], lambda record, line: (parse_example(record), label_field(record, names, known)))
    for example, label in lines:
        found.setdefault(label, []).append(example)
    return found


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over the examples' contents, in order."""
    rows = [[item.input, item.output, item.choices, [dict(turn) for turn in item.messages]] for item in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()


def parse_example(record: Mapping[str, Any]) -> Example:
    """Return the example of one record; see `read_examples`.

    Raises:
        BadLineError: What is wrong with it.
    """
    if "messages" in record:
        turns, output = parse_messages(record["messages"])
        return make_example(turns[-1]["content"], output, record.get("choices", []), turns)
    return make_example(text_field(record, _INPUT_NAMES), text_field(record, _OUTPUT_NAMES), record.get("choices", []))


def make_example(input_: str, output: str, choices: Any, messages: tuple[Mapping[str, str], ...] = ()) -> Example:
    """Return an example, its parts checked.

    Raises:
        BadLineError: The output is empty; or ``choices`` are no list of distinct strings with the output among them.
    """
    if not output:
        raise BadLineError("the output is empty")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadLineError("'choices' must be a list of strings")
    if choices and (output not in choices or len(set(choices)) != len(choices)):
        raise BadLineError(f"'choices' must be distinct and contain the output {output!r}")
    return Example(input_, output, tuple(choices), messages)


def parse_messages(messages: Any) -> tuple[tuple[Mapping[str, str], ...], str]:
    """Return the turns before the last, and the content of the last, which is the assistant's.

    Raises:
        BadLineError: They are not chat turns, or end otherwise.
    """
    fine = isinstance(messages, list) and len(messages) >= 2
    if not fine or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise BadLineError("'messages' must be a list of at least two {'role', 'content'} objects with string values")
    if messages[-1]["role"] != "assistant":
        raise BadLineError(f"the last message must be the assistant's, got role {messages[-1]['role']!r}")
    for turn in messages:
        check_text("messages", turn["content"])
    turns = tuple({"role": turn["role"], "content": turn["content"]} for turn in messages[:-1])
    return turns, messages[-1]["content"]


def text_field(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the text of the one field among ``names`` that the record has.

    Raises:
        BadLineError: It has none or several of them, or something else than text in it.
    """
    given = [name for name in names if name in record]
    if len(given) != 1:
        found = f"both {' and '.join(map(repr, given))}" if given else f"only {sorted(record)}"
        raise BadLineError(f"needs exactly one of {' or '.join(map(repr, names))}, has {found}")
    return check_text(given[0], record[given[0]])


def check_text(name: str, value: Any) -> str:
    """Return ``value`` where it is text that a tokenizer can read.

    Raises:
        BadLineError: It is no text, or has half of a surrogate pair in it, which JSON allows and Unicode does not.
    """
    if not isinstance(value, str):
        raise BadLineError(f"{name!r} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadLineError(f"{name!r} is not valid Unicode ({error.reason} at character {error.start})") from None
    return value


def label_field(record: Mapping[str, Any], names: Sequence[str], known: Collection[str] | None) -> str:
    """Return what a record is labelled with, in one of the fields ``names``.

    Raises:
        BadLineError: No label, two, an empty one, or one that is not ``known`` (None: all are allowed).
    """
    label = text_field(record, names)
    if known is not None and label not in known:
        raise BadLineError(unknown_name(" or ".join(names), label, known))
    if not label:
        raise BadLineError(f"its {' or '.join(names)} is empty")
    return label
