"""``compose merge --data``: records of adapters or tasks to batches, and the merge that runs the model on them."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from compose.cli.console import note, stderr
from compose.errors import ComposeError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from compose.bank import Bank
    from compose.cli.merge_recipe import MergeRequest
    from compose.engine.merged import Merged

LABELS = ("adapter", "task")


def check_data(request: MergeRequest) -> bool:
    """Return whether the method merges with data, after checking that the request has what it needs.

    Raises:
        ComposeError: Data or base are missing, or given to a method without data.
    """
    from compose.engine.data_merge import DATA_METHODS

    if request.method not in DATA_METHODS:
        if request.data is not None:
            known = ", ".join(DATA_METHODS)
            raise ComposeError(f"{request.method!r} takes no data; leave out --data, or use one of: {known}")
        return False
    if request.space != "full":
        raise ComposeError(f"{request.method!r} has no variant in the {request.space} space; leave out --space")
    missing = [
        name
        for name, value in (("--data FILE", request.data), ("--base MODEL", request.base or request.into_base))
        if value is None
    ]
    if missing:
        raise ComposeError(
            f"{request.method!r} merges with data: give {' and '.join(missing)} (lines with input, output and adapter)"
        )
    return True


def run_with_data(bank: Bank, request: MergeRequest, options: dict[str, Any]) -> Merged:
    """Merge the adapters that take part, running the base model on the records.

    Raises:
        ComposeError: Records, model, weights or options do not fit; all bad records are listed.
    """
    from compose.cli.loading import load_base
    from compose.engine.attach import attach
    from compose.engine.data_merge import DATA_METHODS, merge_with_data
    from compose.fewshot.data_batches import data_batches
    from compose.text.examples import read_labelled_examples

    if request.data is None:
        raise AssertionError("checked in check_data")
    per_adapter = DATA_METHODS[request.method].contract.per_adapter
    known = bank.names if per_adapter else None
    examples = read_labelled_examples(request.data, LABELS, known=known)
    chosen = bank if request.weights is None else bank.select(name for name in bank.names if name in request.weights)
    loaded = load_base(str(request.base or request.into_base), device=request.device)
    data = {
        label: data_batches(loaded, found) for label, found in examples.items() if label in chosen or not per_adapter
    }
    with attach(loaded.model, chosen) as attached, DataProgress(request.method) as progress:
        return merge_with_data(
            attached,
            request.method,
            data,
            weights=request.weights,
            rank=request.rank,
            energy=request.energy,
            seed=request.seed,
            progress=progress,
            **options,
        )


class DataProgress:
    """Shows stages on stderr: a live bar on a terminal, one line per stage otherwise; call it with every report.

    Args:
        title: Stands before the stage.
    """

    def __init__(self, title: str) -> None:
        self._title, self._stage, self._started = title, "", time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> DataProgress:
        console = stderr()
        if console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(self._title, total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take one report."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._title}: {stage}", completed=done, total=total)
        elif stage != self._stage:
            note(f"{self._title}: {stage}, {total} steps, {time.monotonic() - self._started:.1f} s")
        self._stage = stage
