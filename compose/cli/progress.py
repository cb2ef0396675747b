"""Progress of a search on stderr: a live line on a terminal, one line per stage otherwise."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import TYPE_CHECKING

from compose.cli.console import note, stderr
from compose.report.plain import NONE

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from compose.fewshot.run import ProgressEvent


class SearchProgress:
    """Shows stage, best value, cost of the budget and the time left; call it with every event.

    Args:
        title: Stands before the stage.
    """

    def __init__(self, title: str = "search") -> None:
        self._title = title
        self._stage = ""
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> SearchProgress:
        console = stderr()
        if console.is_terminal:
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("best {task.fields[best]}  cost {task.fields[cost]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("left", style="dim"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(f"{self._title}: loading", total=None, best=NONE, cost=NONE)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: ProgressEvent) -> None:
        """Take one event."""
        cost = f"{event.cost:.0f}" if event.budget is None else f"{event.cost:.0f}/{event.budget:.0f}"
        best = NONE if event.best is None or not math.isfinite(event.best) else f"{event.best:.4g}"
        if self._bar is not None and self._task is not None:
            description = f"{self._title}: {event.stage}"
            self._bar.update(
                self._task, description=description, completed=event.cost, total=event.budget, best=best, cost=cost
            )
        elif event.stage != self._stage:
            seconds = f"{time.monotonic() - self._started:.1f} s"
            parts = [
                event.stage,
                f"cost {cost}" if event.cost else "",
                "" if best == NONE else f"best {best}",
                seconds,
            ]
            note(f"{self._title}: {', '.join(part for part in parts if part)}")
        self._stage = event.stage
