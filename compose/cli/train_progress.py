"""Progress of a training on stderr: a live line on a terminal, about twenty lines otherwise."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from compose.cli.console import note, stderr
from compose.report.plain import NONE

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from compose.routers.train_report import StepReport

_LINES = 20


class TrainProgress:
    """Shows step, loss, auxiliary loss, entropy and load of the gates; call it with every step's report.

    Args:
        title: Stands before the stage.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> TrainProgress:
        console = stderr()
        if console.is_terminal:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}", markup=False),
                TextColumn("{task.fields[facts]}", markup=False),
                TextColumn("left", style="dim"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(f"{self._title}: loading", total=None, facts="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, report: StepReport) -> None:
        """Take one step's report."""
        facts = step_facts(report)
        if self._bar is not None and self._task is not None:
            description = f"{self._title}: {report.stage}"
            self._bar.update(
                self._task, description=description, completed=report.step, total=report.total, facts=facts
            )
        elif report.stage != self._stage or report.step % max(1, report.total // _LINES) == 0 or _is_last(report):
            place = f"{report.stage}, step {report.step}/{report.total}"
            note(f"{self._title}: {place}, {facts}, {report.seconds:.1f} s")
        self._stage = report.stage


def step_facts(report: StepReport) -> str:
    """``loss 1.234  aux 0.01  entropy 1.95  load 0.08-0.21``; what there is none of is left out."""
    parts = [f"loss {report.loss:.4f}"]
    if report.aux:
        parts.append(f"aux {report.aux_loss:.4g}")
    parts.append(f"entropy {NONE if report.entropy is None else f'{report.entropy:.3f}'}")
    if report.load:
        parts.append(f"load {min(report.load):.2f}-{max(report.load):.2f}")
    return "  ".join(parts)


def _is_last(report: StepReport) -> bool:
    return report.step == report.total
