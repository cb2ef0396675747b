"""Where output goes: results to stdout, everything else to stderr; plain text unless a terminal reads it.

Text from adapters, files and models passes through ``printable``, and Rich's markup is off, so a name can neither
colour the output nor move the cursor.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compose.report.plain import printable

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 110


def stdout() -> Console:
    """Return a console on standard output, for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Return a console on standard error, for progress and remarks."""
    return _console(stderr=True)


def say(text: str, style: str = "") -> None:
    """Print a line of the result."""
    stdout().print(printable(text), style=style or None, soft_wrap=True)


def note(text: str, style: str = "dim") -> None:
    """Print a remark to standard error."""
    stderr().print(printable(text), style=style or None, soft_wrap=True)


def fail(message: str) -> None:
    """Print an error to standard error; the caller chooses the exit code."""
    stderr().print(f"error: {printable(message)}", style="red", soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one JSON object to standard output; numbers that are not finite become ``null``."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", strong: int = -1) -> None:
    """Print a table of the result.

    Args:
        columns: Headings; one that starts with ``>`` is aligned right.
        rows: Cells, as many as columns.
        title: Printed above.
        strong: Index of a row to emphasise.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=printable(title) or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, title_style="bold"
    )
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for index, row in enumerate(rows):
        table.add_row(*(printable(cell) for cell in row), style="bold" if index == strong else None)
    stdout().print(table)


def print_facts(facts: Mapping[str, Any], *, title: str = "") -> None:
    """Print names and values of the result, one pair a line; ``None`` values are left out."""
    shown = {name: value for name, value in facts.items() if value is not None}
    width = max((len(name) for name in shown), default=0)
    if title:
        say(title, "bold")
    for name, value in shown.items():
        say(f"{name:<{width}}  {value}")


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH
    return Console(file=stream, markup=False, emoji=False, highlight=False, width=width)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
