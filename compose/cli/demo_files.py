"""The shipped demo as the commands see it: where its files are, its tasks, and a search's inputs from one of them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.cli.console import print_table
from compose.errors import ComposeError, UnknownNameError

if TYPE_CHECKING:
    from compose.demo.tasks import Task
    from compose.text.examples import Example

TEST_ITEMS = 100
HELD_OUT = ("wording", "composition", "mixture")


def demo_paths() -> tuple[Path, Path]:
    """Return the folders of the shipped base model and bank.

    Raises:
        ComposeError: They are not there.
    """
    from compose.demo.assets import demo_bank, demo_base

    base, bank = Path(demo_base()), Path(demo_bank())
    missing = [str(folder) for folder in (base, bank) if not folder.is_dir()]
    if missing:
        raise ComposeError(f"the demo's files are missing: {', '.join(missing)}; 'compose demo build' makes them")
    return base, bank


def demo_state() -> dict[str, Any]:
    """Return whether the demo's files are there, for ``compose doctor``."""
    try:
        base, bank = demo_paths()
    except ComposeError as error:
        return {"files": False, "problem": str(error)}
    files = [path for folder in (base, bank) for path in folder.rglob("*") if path.is_file()]
    return {
        "files": True,
        "base": str(base),
        "bank": str(bank),
        "adapters": sum(1 for folder in bank.iterdir() if folder.is_dir()),
        "bytes": sum(path.stat().st_size for path in files),
    }


def demo_task(name: str) -> Task:
    """Return a shipped task.

    Raises:
        UnknownNameError: There is none of this name.
    """
    from compose.demo.tasks import TASKS

    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UnknownNameError(
            f"unknown demo task {name!r}; {hint}'compose search --demo list' names all {len(TASKS)}"
        )
    return TASKS[name]


def demo_examples(task: Task, shots: int, draw: int, test: int | None = None) -> tuple[list[Example], list[Example]]:
    """Return one draw of shots and the first ``test`` (`TEST_ITEMS`) test items; they share no content."""
    from compose.demo.tasks import shots as draw_shots
    from compose.demo.tasks import test_items
    from compose.text.examples import Example

    drawn, held_out = draw_shots(task, shots, draw), test_items(task, TEST_ITEMS if test is None else test)
    return [Example(*item) for item in drawn], [Example(*item) for item in held_out]


def demo_tasks() -> list[dict[str, Any]]:
    """Return name, group, description and skills of every task, held-out groups first."""
    from compose.demo.tasks import TASKS

    order = (*HELD_OUT, "upstream")
    listed = [
        {"name": task.name, "group": task.group, "description": task.description, "skills": list(task.skills)}
        for task in TASKS.values()
    ]
    return sorted(listed, key=lambda task: order.index(task["group"]))


def show_tasks(tasks: list[dict[str, Any]]) -> None:
    """Print the tasks as a table."""
    print_table(["task", "group", "description"], [[one["name"], one["group"], one["description"]] for one in tasks])
