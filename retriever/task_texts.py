"""Inputs of tasks: read from JSONL, split into what trains, what represents an adapter, and what asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compose.errors import ComposeError, UnknownNameError, unknown_name
from compose.text.examples import label_field, parse_messages, text_field
from compose.text.jsonl import read_jsonl

LABELS = ("adapter", "task")
INPUTS = ("input", "prompt")

TaskTexts = dict[str, list[str]]
"""Task or adapter -> its inputs, in order of appearance, each once."""


def read_task_texts(files: Sequence[Path], *, known: Collection[str] | None = None) -> TaskTexts:
    """Read ``{"adapter" or "task", "input" or "prompt"}`` per line; other fields, such as outputs, are ignored.

    ``messages`` in place of an input: the last turn before the answer.

    Args:
        files: JSONL.
        known: Names that are allowed; None: any.

    Raises:
        ExamplesError: A file is missing, too large or empty, or lines are bad, all named with their number.
    """
    wanted = f"{' or '.join(map(repr, LABELS))} and {' or '.join(map(repr, INPUTS))}"
    found: TaskTexts = {}
    for task, text in read_jsonl(
        files, lambda record, line: (label_field(record, LABELS, known), _input(record)), fields=wanted
    ):
        found.setdefault(task, []).append(text)
    return {task: list(dict.fromkeys(texts)) for task, texts in found.items()}


def _input(record: Mapping[str, Any]) -> str:
    if "messages" in record:
        turns, _ = parse_messages(record["messages"])
        return turns[-1]["content"]
    return text_field(record, INPUTS)


@dataclass(frozen=True)
class TaskSplit:
    """What the training of a retriever sees, and what measures it.

    Attributes:
        train: Trained on: tasks that are seen, without their queries.
        samples: What represents every adapter: of seen tasks the texts trained on, of unseen ones the texts that do
            not ask.
        seen: Queries of tasks that were trained on.
        unseen: Queries of tasks of which training saw nothing.
    """

    train: TaskTexts
    samples: TaskTexts
    seen: TaskTexts
    unseen: TaskTexts


def split_tasks(
    texts: Mapping[str, Sequence[str]], *, unseen: float | Sequence[str], held_out: float, seed: int
) -> TaskSplit:
    """Hold out whole tasks, and of every task a share of its inputs as queries.

    Args:
        texts: Task -> distinct inputs, at least two each.
        unseen: Share of the tasks, drawn by ``seed`` and at least one, or their names.
        held_out: Share of every task's inputs that ask, at least one and never all.
        seed: Of every draw; a task's draw depends on its place among the sorted names, not on the order given.

    Raises:
        ComposeError: A share out of range, fewer than two tasks left to train on, or a task with one input.
        UnknownNameError: ``unseen`` names a task that is not there.
    """
    names = sorted(texts)
    small = [name for name in names if len(texts[name]) < 2]
    if small:
        raise ComposeError(
            f"every task needs at least two different inputs, {small[:5]} have one; add inputs or leave out"
        )
    if not 0 < held_out < 1:
        raise ComposeError(f"held_out must lie in (0, 1), got {held_out}")
    generator = np.random.default_rng(seed)
    hidden = _unseen(names, unseen, generator)
    if len(names) - len(hidden) < 2:
        raise ComposeError(
            f"{len(names)} tasks with {len(hidden)} unseen leave fewer than two to train on; in-batch negatives need "
            "another task. Give more tasks, or hide fewer"
        )
    split = TaskSplit({}, {}, {}, {})
    for name in names:
        order = generator.permutation(len(texts[name]))
        asking = min(max(1, round(held_out * len(order))), len(order) - 1)
        split.samples[name] = [texts[name][index] for index in sorted(order[asking:])]
        queries = [texts[name][index] for index in sorted(order[:asking])]
        (split.unseen if name in hidden else split.seen)[name] = queries
        if name not in hidden:
            split.train[name] = split.samples[name]
    return split


def _unseen(names: Sequence[str], unseen: float | Sequence[str], generator: np.random.Generator) -> set[str]:
    if not isinstance(unseen, float | int):
        for name in unseen:
            if name not in names:
                raise UnknownNameError(unknown_name("task", name, names))
        return set(unseen)
    if not 0 <= unseen < 1:
        raise ComposeError(f"unseen must be a share in [0, 1) or a list of tasks, got {unseen}")
    count = max(1, round(unseen * len(names))) if unseen else 0
    return {names[index] for index in generator.permutation(len(names))[:count]}
