"""The tasks of the demo: one per adapter, and three groups of held-out tasks.

Groups: ``upstream`` (an adapter is trained on it), ``wording`` (a skill under an unseen instruction), ``composition``
(two or three skills at once) and ``mixture`` (items of two tasks, told apart by content or by a mark).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

from compose.demo.contents import Split, draw_content
from compose.demo.operations import OPERATIONS, run_program
from compose.demo.wordings import COMPOSITIONS, MIXTURES, NEW_WORDINGS, TRAINING_WORDINGS

Group = Literal["upstream", "wording", "composition", "mixture"]


class Example(NamedTuple):
    """One item: the whole instruction with its content, and the expected answer."""

    input: str
    output: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """A stream of examples.

    Attributes:
        name: Unique name.
        group: What the task is for.
        description: One line for people.
        skills: Names of the upstream tasks that it draws on.
        draw: Makes one example of a split.
    """

    name: str
    group: Group
    description: str
    skills: tuple[str, ...]
    draw: Callable[[random.Random, Split], Example]

    def sample(self, seed: int | str, n: int, split: Split = "train") -> list[Example]:
        """``n`` examples with distinct inputs, a function of the task's name, the seed and the split."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Example] = {}
        for _ in range(200 * n):
            if len(found) == n:
                break
            example = self.draw(rng, split)
            found.setdefault(example.input, example)
        else:
            raise ValueError(f"task {self.name!r} has fewer than {n} distinct {split} items")
        return list(found.values())


def shots(task: Task, n: int, draw: int) -> list[Example]:
    """The ``n`` examples shown to a search; for one draw, fewer shots are a prefix of more."""
    return task.sample(draw, max(n, 32), "shots")[:n]


def test_items(task: Task, n: int) -> list[Example]:
    """``n`` items to report on, disjoint from every shot and from everything that an adapter was trained on."""
    return task.sample(0, max(n, 300), "test")[:n]


test_items.__test__ = False  # type: ignore[attr-defined]  # the name is not a pytest case


def draw_program(operations: Sequence[str], kinds: Sequence[str], wordings: Sequence[str]) -> "DrawFunction":
    """Draws items whose answer differs from the content and from what any part of the program would give."""
    parts = [part for size in range(len(operations)) for part in combinations(operations, size)]

    def draw(rng: random.Random, split: Split) -> Example:
        while True:
            content = draw_content(rng.choice(kinds), rng, split)
            if "spell_digits" in operations and "largest" not in operations and content.count(" ") > 1:
                continue
            answer = run_program(operations, content)
            if "longest" in operations and _has_tie(content):
                continue
            if all(answer != run_program(part, content) for part in parts):
                return Example(rng.choice(wordings).format(c=content), answer)

    return draw


DrawFunction = Callable[[random.Random, Split], Example]


def _has_tie(content: str) -> bool:
    lengths = sorted(len(word) for word in content.split(" "))
    return lengths[-1] == lengths[-2]


def _draw_either(first: DrawFunction, second: DrawFunction) -> DrawFunction:
    return lambda rng, split: (first if rng.random() < 0.5 else second)(rng, split)


def upstream_kinds(operation: str) -> tuple[str, ...]:
    """The kinds of content that an operation's own task uses."""
    kinds = OPERATIONS[operation].kinds
    return tuple(kind for kind in kinds if kind in ("words", "numbers")) or kinds[:1]


def _upstream_tasks() -> list[Task]:
    return [
        Task(
            name=name,
            group="upstream",
            description=wordings[0].removesuffix(": {c}"),
            skills=(name,),
            draw=draw_program((name,), upstream_kinds(name), wordings),
        )
        for name, wordings in TRAINING_WORDINGS.items()
    ]


def _wording_tasks() -> list[Task]:
    return [
        Task(
            name=f"new_wording_{name}",
            group="wording",
            description=f"{name} asked as: {wording}",
            skills=(name,),
            draw=draw_program((name,), upstream_kinds(name), (wording,)),
        )
        for name, wording in NEW_WORDINGS.items()
    ]


def _composition_tasks() -> list[Task]:
    return [
        Task(
            name="_and_".join(operations),
            group="composition",
            description=wording.removesuffix(": {c}"),
            skills=operations,
            draw=draw_program(operations, (kind,), (wording,)),
        )
        for operations, (kind, wording) in COMPOSITIONS.items()
    ]


def _mixture_tasks() -> list[Task]:
    return [
        Task(
            name=name,
            group="mixture",
            description=f"either {first[0]} ({first[2]}) or {second[0]} ({second[2]})",
            skills=(first[0], second[0]),
            draw=_draw_either(*(draw_program((half[0],), (half[1],), (half[2],)) for half in (first, second))),
        )
        for name, (first, second) in MIXTURES.items()
    ]


TASKS: dict[str, Task] = {
    task.name: task for task in (*_upstream_tasks(), *_wording_tasks(), *_composition_tasks(), *_mixture_tasks())
}
