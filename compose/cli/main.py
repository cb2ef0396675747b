"""The command ``compose``: builds the application from the registered commands and sets the exit codes.

0: done. 1: a bug, with its traceback, or a disk that is full or failing, with one message on stderr. 2: wrong usage or
refused input, with one message. 130: interrupted.
"""

from __future__ import annotations

import errno
import functools
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import compose
from compose.cli import COMMANDS, Command
from compose.cli.console import fail
from compose.errors import ComposeError

ABOUT = """Compose: adapter composition and mixtures of LoRA experts.

A few examples of a task go in; weights over a bank of trained adapters, a new adapter and a report come out."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main() -> None:
    """Run the command line on ``sys.argv``."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    build_app()(prog_name="compose")


def build_app() -> typer.Typer:
    """Return the application with every registered command."""
    app = typer.Typer(
        help=ABOUT,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=_examples(("compose demo", "compose search --demo list", "compose COMMAND --help")),
    )
    app.callback()(_root)
    for name in COMMANDS:
        _add(app, name, COMMANDS[name])
    return app


def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with expected errors turned into a message and an exit code."""

    @functools.wraps(run)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return run(*arguments, **options)
        except ComposeError as error:
            fail(str(error))
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in _DISK:
                raise
            fail(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            fail("interrupted")
            raise typer.Exit(130) from None

    return call


def _print_version(wanted: bool) -> None:
    if wanted:
        print(compose.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Options before the command."""


def _add(app: typer.Typer, name: str, command: Command) -> None:
    if not command.subcommands:
        app.command(name, epilog=_examples(command.examples))(guarded(command.run))
        return
    group = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
    group.callback(invoke_without_command=True, epilog=_examples(command.examples))(guarded(command.run))
    for word, subcommand in command.subcommands.items():
        _add(group, word, subcommand)
    app.add_typer(group, name=name)


def _examples(lines: tuple[str, ...]) -> str:
    return "\n".join(("[bold]Examples[/bold]", *(f"  $ {line}" for line in lines)))


if __name__ == "__main__":
    main()
