"""Output: plain where no terminal reads it, and nothing in a name can steer the terminal."""

import io
import json

import pytest

from compose.cli.console import fail, note, print_facts, print_json, print_table, say


def test_results_go_to_stdout_and_remarks_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("a result")
    note("a remark")
    fail("a problem")
    captured = capsys.readouterr()
    assert captured.out == "a result\n"
    assert captured.err == "a remark\nerror: a problem\n"


def test_markup_and_escapes_in_names_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["adapter"], [["[red]x[/red]"], ["\x1b[31mred\x07"], [":smile:"]], title="[b]t\x1b]0;x\x07")
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "\\x1b[31mred\\x07" in out
    assert ":smile:" in out
    assert "\x1b" not in out
    assert "\x07" not in out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_needs_a_terminal_and_obeys_no_color(
    monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    fail("x")
    assert ("\x1b[31m" in terminal.getvalue()) is coloured


def test_json_is_one_object_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": (1, {"d": "é"})})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": [1, {"d": "é"}]}


def test_facts_leave_out_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts({"base": "x", "sha256": None, "n": 3})
    assert capsys.readouterr().out == "base  x\nn     3\n"
