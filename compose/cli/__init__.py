"""The command line: one file per command, entered in ``COMMANDS`` by its decorator and found by a scan of this folder.

Nothing here may import torch at the top of a module: ``compose --help`` imports all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compose.registry import Registry


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        run: A function with typer annotations; its docstring is the help.
        examples: Command lines shown below the help.
        subcommands: Further words after the command; then ``run`` is what happens without one.
    """

    run: Callable[..., Any]
    examples: tuple[str, ...]
    subcommands: Mapping[str, Command] = field(default_factory=dict)


COMMANDS: Registry[Command] = Registry("command", package="compose.cli")
