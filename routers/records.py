"""Records of mixed-task data: one schema, read from many, with the problems of all files told at once.

The schema is ``{"task", "prompt", "response"}`` or ``{"task", "messages"}`` and, optional, ``"expert"``, ``"group"``,
``"cluster"``, ``"weight"`` and ``"choices"``. Columns of other names are named by the caller, or known already:

| text | used by |
| --- | --- |
| ``prompt`` or ``input``, with ``response`` or ``output`` | |
| ``messages`` | chat; the last turn, the assistant's, is the response |
| ``instruction`` and, where it is not empty, ``input`` behind it on a new line; ``output``, ``response`` or, without \
these, ``answer`` | MoLA (arXiv:2402.08562), LoRAMoE (arXiv:2312.09979) |
| ``source``, ``target`` | HMoRA |
| ``Q``, ``A``; ``question``, ``answer`` | DLP-LoRA |

``adapter`` stands for ``expert``, ``cluster_id`` for ``cluster``, ``task_name`` for ``task``, and ``task_type`` for
``group`` where it holds a number (LoRAMoE). A folder holds one task per file ``<task>.jsonl`` or per subfolder
``<task>/train.jsonl`` (MeteoRA, arXiv:2405.13053); a task named like an adapter is the label of that expert.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compose.errors import ComposeError, ExamplesError, unknown_name
from compose.text.examples import Example, check_text, examples_hash, make_example, parse_messages, text_field
from compose.text.jsonl import BadLineError, Line, raise_problems, read_jsonl

logger = logging.getLogger(__name__)

FIELDS = ("task", "prompt", "response", "instruction", "messages", "choices", "expert", "group", "cluster", "weight")
"""Fields that ``columns`` can name a column for."""

MAX_WEIGHT = 1e9

_OTHER_NAMES = {
    "task": ("task_name",),
    "expert": ("adapter",),
    "group": ("task_type",),
    "cluster": ("cluster_id",),
}
_PAIRS = (
    *((prompt, response) for prompt in ("prompt", "input") for response in ("response", "output")),
    ("source", "target"),
    ("Q", "A"),
    ("question", "answer"),
)
_PROMPTS = tuple(dict.fromkeys(prompt for prompt, _ in _PAIRS))
_RESPONSES = tuple(dict.fromkeys(response for _, response in _PAIRS))


@dataclass(frozen=True)
class MixedExample:
    """An example that says which task it belongs to.

    Attributes:
        example: Input, response, choices, chat turns.
        task: Name of its task.
        expert: Name of the expert a router should choose for it; None: not known.
        group: 0 or 1: the type that LoRAMoE's balance loss pairs with the second or first half of the experts.
        cluster: Number of its cluster (MoCLE), from 0.
        weight: How often it is drawn beside others of its task, in proportion; 0: never.
        place: Where it was read, ``file:line``; no part of its value.
    """

    example: Example
    task: str
    expert: str | None = None
    group: int | None = None
    cluster: int | None = None
    weight: float = 1.0
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        problems = []
        if not self.task:
            problems.append("its task is empty")
        if self.expert == "":
            problems.append("its expert is empty; leave it out or write null")
        if self.group is not None and (not _is_whole(self.group) or self.group not in (0, 1)):
            problems.append(f"'group' must be 0, 1 or null, got {self.group!r}")
        if self.cluster is not None and (not _is_whole(self.cluster) or self.cluster < 0):
            problems.append(f"'cluster' must be a whole number from 0 or null, got {self.cluster!r}")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight <= MAX_WEIGHT:
            problems.append(f"'weight' must be a number from 0 to 1e9, got {self.weight!r}")
        if problems:
            raise ExamplesError("; ".join(problems))


def read_mixed(
    path: str | Path | Sequence[str | Path],
    *,
    columns: Mapping[str, str] = {},
    experts: Collection[str] | None = None,
    tasks: Collection[str] | None = None,
    split: str = "train",
) -> list[MixedExample]:
    """Read mixed-task records; columns that mean nothing here are ignored, blank lines skipped.

    Args:
        path: A JSONL file, a folder with one task per file or subfolder, or several of these.
        columns: Field of `FIELDS` -> name of the column that holds it, for columns of other names. A field that is
            named here is read from that column only; ``task``, and what a prompt and a response need, has to be there
            on every line.
        experts: Names of the bank's adapters; None: any name will do, and files of a folder label no expert.
        tasks: Names that are allowed; None: any.
        split: Which ``<task>/<split>.jsonl`` of a folder's subfolders to read.

    Returns:
        In the order of files (those of a folder by name) and lines.

    Raises:
        ExamplesError: A path is missing, too large or empty; or lines are bad, all named with file and number; or no
            line has a column that ``columns`` names.
        ComposeError: ``columns`` names no field of a record.
    """
    check_columns(columns)
    paths = [path] if isinstance(path, str | Path) else path
    sources: dict[Path, str | None] = {}
    for one in paths:
        sources |= _sources(Path(one), split)
    _tell_unmatched([task for task in sources.values() if task is not None], experts)

    absent = dict(columns)

    def parse(record: Mapping[str, Any], line: Line) -> MixedExample:
        for name in [name for name, column in absent.items() if column in record]:
            del absent[name]
        found = _parse(record, columns, sources[line.file], experts, str(line))
        if tasks is not None and found.task not in tasks:
            raise BadLineError(unknown_name("task", found.task, tasks))
        if experts is not None and found.expert is not None and found.expert not in experts:
            raise BadLineError(unknown_name("expert", found.expert, experts))
        return found

    found = read_jsonl(list(sources), parse, fields="a task, a prompt and a response")
    raise_problems([f"no line has the column {column!r} for {name!r}" for name, column in absent.items()])
    return found


def task_names(examples: Sequence[MixedExample]) -> tuple[str, ...]:
    """Names of the tasks, sorted, so that they do not depend on the order of records."""
    return tuple(sorted({example.task for example in examples}))


def mixed_hash(examples: Sequence[MixedExample]) -> str:
    """SHA-256 over contents and labels, in order."""
    labels = [[each.task, each.expert, each.group, each.cluster, float(each.weight)] for each in examples]
    contents = examples_hash([each.example for each in examples])
    return hashlib.sha256(json.dumps([contents, labels]).encode()).hexdigest()


def check_columns(columns: Mapping[str, str]) -> None:
    """Check that columns are named for fields of a record; see `read_mixed`.

    Raises:
        ComposeError: They are not; all problems are listed.
    """
    problems = [unknown_name("field of a record", name, FIELDS) for name in columns if name not in FIELDS]
    bad = [name for name, column in columns.items() if not isinstance(column, str) or not column]
    problems += [f"the column of {name!r} must be a name, got {columns[name]!r}" for name in bad]
    if "messages" in columns and (both := [name for name in ("prompt", "instruction", "response") if name in columns]):
        problems.append(f"'messages' stands for prompt and response; leave out the columns of {', '.join(both)}")
    if problems:
        raise ComposeError("; ".join(problems))


def _sources(path: Path, split: str) -> dict[Path, str | None]:
    """File -> the task its name says, None for a file that is given by itself."""
    if not path.is_dir():
        return {path: None}
    named = [(file.stem, file) for file in path.glob("*.jsonl")]
    named += [(file.parent.name, file) for file in path.glob(f"*/{split}.jsonl")]
    named = sorted((task, file) for task, file in named if not task.startswith("."))
    if not named:
        raise ExamplesError(f"{path}: no task in this folder; it needs files <task>.jsonl or <task>/{split}.jsonl")
    names = [task for task, _ in named]
    if twice := sorted({task for task in names if names.count(task) > 1}):
        raise ExamplesError(f"{path}: {', '.join(twice)} is there as a file and as a folder; leave one of them")
    return {file: task for task, file in named}


def _tell_unmatched(tasks: Sequence[str], experts: Collection[str] | None) -> None:
    if experts is None or not any(task in experts for task in tasks):
        return
    for task in tasks:
        if task not in experts:
            logger.warning("task %r labels no expert: %s", task, unknown_name("expert", task, experts))


def _parse(
    record: Mapping[str, Any],
    columns: Mapping[str, str],
    task: str | None,
    experts: Collection[str] | None,
    place: str,
) -> MixedExample:
    example = _example(record, columns)
    own = _value(record, columns, "task")
    if own is not None and not isinstance(own, str):
        raise BadLineError(f"'task' must be a string, got {type(own).__name__}")
    if own is not None and task is not None and own != task:
        raise BadLineError(f"its task {own!r} is not that of its file, {task!r}")
    if own is None and task is None:
        raise BadLineError("has no task; add a field 'task', name its column, or give a folder with one file per task")
    named = _column(record, columns, "expert") is not None
    expert = _value(record, columns, "expert")
    if expert is not None and not isinstance(expert, str):
        raise BadLineError(f"'expert' must be a string or null, got {type(expert).__name__}")
    if not named and task is not None and experts is not None and task in experts:
        expert = task
    weight = _value(record, columns, "weight")
    try:
        return MixedExample(
            example,
            check_text("task", task if own is None else own),
            expert,
            _group(record, columns),
            _value(record, columns, "cluster"),
            1.0 if weight is None else weight,
            place,
        )
    except ExamplesError as error:
        raise BadLineError(str(error)) from None


def _example(record: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    choices = _value(record, columns, "choices")
    choices = [] if choices is None else choices
    if "messages" in columns:
        turns, output = parse_messages(_required(record, columns["messages"], "messages"))
        return make_example(turns[-1]["content"], output, choices, turns)
    if {"prompt", "response", "instruction"} & columns.keys():
        return make_example(*_named_texts(record, columns), choices)
    if "messages" in record:
        turns, output = parse_messages(record["messages"])
        return make_example(turns[-1]["content"], output, choices, turns)
    return make_example(*_known_texts(record), choices)


def _named_texts(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    """Prompt and response where ``columns`` names one of them or both."""
    parts = [_text(record, columns[name], name) for name in ("instruction", "prompt") if name in columns]
    prompt = "\n".join(part for part in parts if part) if parts else text_field(record, _PROMPTS)
    if "response" in columns:
        return prompt, _text(record, columns["response"], "response")
    return prompt, text_field(record, _RESPONSES)


def _known_texts(record: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and response from columns with known names."""
    if "instruction" in record:
        given = record.get("input")
        parts = [check_text("instruction", record["instruction"]), check_text("input", "" if given is None else given)]
        written = [name for name in ("output", "response") if name in record] or ["answer"]
        return "\n".join(part for part in parts if part), text_field(record, written)
    pairs = [pair for pair in _PAIRS if pair[0] in record and pair[1] in record]
    if len(pairs) != 1:
        known = "; ".join(f"{prompt}, {response}" for prompt, response in pairs or _PAIRS)
        found = "several pairs of columns" if pairs else f"no known pair of columns, only {sorted(record)}"
        raise BadLineError(f"has {found} for prompt and response ({known}); name the columns to read")
    prompt, response = pairs[0]
    return check_text(prompt, record[prompt]), check_text(response, record[response])


def _text(record: Mapping[str, Any], column: str, name: str) -> str:
    value = _required(record, column, name)
    return check_text(column, "" if value is None and name == "prompt" else value)


def _required(record: Mapping[str, Any], column: str, name: str) -> Any:
    if column not in record:
        raise BadLineError(f"has no column {column!r} for {name!r}; it has {sorted(record)}")
    return record[column]


def _group(record: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """``group``; a ``task_type`` that is no number means something else."""
    value = _value(record, columns, "group")
    if _column(record, columns, "group") == "task_type" and "group" not in columns and not _is_whole(value):
        return None
    return value


def _value(record: Mapping[str, Any], columns: Mapping[str, str], name: str) -> Any:
    """What the record says of an optional field; None: nothing, or null."""
    column = _column(record, columns, name)
    if column is None and name == "task" and name in columns:
        return _required(record, columns[name], name)
    return None if column is None else record[column]


def _column(record: Mapping[str, Any], columns: Mapping[str, str], name: str) -> str | None:
    """The one column of the record that holds a field."""
    names = (columns[name],) if name in columns else (name, *_OTHER_NAMES.get(name, ()))
    given = [each for each in names if each in record]
    if len(given) > 1 and given[1] != "task_type":
        raise BadLineError(f"has both {' and '.join(map(repr, given))}; leave one or name the column to read")
    return given[0] if given else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
