"""The program as a whole: help, start-up, exit codes, and what goes to which stream."""

import errno
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from compose.cli import COMMANDS, Command
from compose.cli.main import build_app, guarded
from compose.errors import ComposeError

NAMES = [
    "audit",
    "compress",
    "convert",
    "demo",
    "doctor",
    "eval",
    "generate",
    "index",
    "inspect",
    "merge",
    "retrieve",
    "retriever",
    "route",
    "search",
    "train",
]
INDEX_WORDS = ["add", "audit", "embed", "export", "gc", "import", "ls", "query", "remove", "show", "verify"]
SUBCOMMANDS = [["demo", "build"], ["retriever", "train"], *(["index", word] for word in INDEX_WORDS)]


def test_the_commands_are_the_files_of_the_folder() -> None:
    assert list(COMMANDS) == NAMES


@pytest.mark.parametrize("words", [*([name] for name in NAMES), *SUBCOMMANDS], ids=" ".join)
def test_every_command_has_help_with_examples(words: list[str]) -> None:
    result = CliRunner().invoke(build_app(), [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "Examples" in result.output
    assert f"$ compose {words[0]}" in result.output
    assert "Usage: " in result.output


def test_every_option_has_a_help_text() -> None:
    command = typer.main.get_command(build_app())
    for name, entry in command.commands.items():
        silent = [p.name for p in entry.params if p.name != "help" and not getattr(p, "help", None)]
        assert silent == [], f"{name}: options without help: {silent}"


def test_help_starts_within_half_a_second_of_cpu_and_without_torch() -> None:
    code = (
        "import os, sys\n"
        "from compose.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "spent = sum(os.times()[:2])\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'jinja2') if m in sys.modules]\n"
        "print(code, heavy, spent < 0.5, spent, file=sys.stderr)\n"
    )
    best = []
    for _ in range(3):
        command = [sys.executable, "-P", "-c", code, "--help"]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
        assert "search" in done.stdout
        best.append(done.stderr.split(" "))
    assert best[0][:2] == ["0", "[]"]
    assert any(words[2] == "True" for words in best), best


def test_no_command_module_imports_torch() -> None:
    code = "from compose.cli import COMMANDS; list(COMMANDS); import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_version_is_one_line(call) -> None:
    done = call("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().count(".") == 2


def raising(error: BaseException):
    app = typer.Typer(pretty_exceptions_enable=False)

    def command() -> None:
        raise error

    app.command()(guarded(command))
    return CliRunner().invoke(app)


def test_an_expected_error_is_one_message_on_stderr_and_exit_code_2() -> None:
    result = raising(ComposeError("what was wrong"))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: what was wrong\n"


def test_a_full_disk_is_one_message_on_stderr_and_exit_code_1() -> None:
    result = raising(OSError(errno.ENOSPC, "No space left on device", "out/x"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"error: [Errno {errno.ENOSPC}] No space left on device: 'out/x'\n"
    assert isinstance(raising(FileNotFoundError(errno.ENOENT, "no")).exception, FileNotFoundError)


def test_an_interruption_exits_with_130() -> None:
    result = raising(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stdout == ""


def test_a_bug_keeps_its_traceback() -> None:
    result = raising(ZeroDivisionError("a bug"))
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_unknown_option_exits_with_2_and_stdout_stays_empty(call) -> None:
    done = call("search", "--no-such-option")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no-such-option" in done.stderr


def test_a_command_needs_a_function_and_examples() -> None:
    for name in COMMANDS:
        assert isinstance(COMMANDS[name], Command)
        assert COMMANDS[name].examples
        assert COMMANDS[name].run.__doc__
