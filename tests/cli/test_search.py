"""``compose search``: from files to a run folder, through the real program, and its refusals."""

import json
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli.main import build_app
from compose.cli.search_request import SearchRequest, resume_command
from compose.errors import ComposeError

COLUMNS = {"COLUMNS": "150"}
DEFAULTS = {
    "base": "b", "bank": (), "examples": None, "test": None, "demo": None, "shots": None, "draw": None,
    "device": "cpu", "dtype": "auto", "strategy": "auto", "combine": "outputs", "layers": None, "budget": None,
    "candidates": 20, "preselect": "loss", "retriever": None, "l1": 0.2, "folds": 5, "seed": 0, "controls": "auto",
    "rank": None, "out": None, "resume": False, "force": False, "dry_run": False,
}  # fmt: skip


def invoke(*arguments: str, **more):
    return CliRunner().invoke(build_app(), list(arguments), env=COLUMNS, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, workspace):
    """One search through the program: its process result and its folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    inputs = ["--base", str(workspace.base), "--bank", str(workspace.bank), "--examples", str(workspace.examples)]
    options = ["--test", str(workspace.test), "--strategy", "cma", "--budget", "40", "--controls", "base,best-single"]
    return invoke("search", *inputs, *options, "--l1", "0", "--out", str(out)), out


def test_a_search_writes_a_run_folder_and_prints_the_result(finished) -> None:
    result, out = finished
    assert result.exit_code == 0, result.stderr
    report = json.loads((out / "report.json").read_text())
    assert {path.name for path in out.iterdir()} >= {"report.json", "report.html", "README.md", "events.jsonl"}
    assert not out.with_name("run.partial").exists()
    assert str(out) in result.stdout
    assert "forward-equivalents" in result.stdout
    for control in report["controls"]:
        assert control["label"] in result.stdout
    assert [control["name"] for control in report["controls"]] == ["composed", "base", "best_single"]
    assert report["command"][0] == "compose"


def test_progress_goes_to_stderr_only(finished) -> None:
    result, _ = finished
    assert "search: " in result.stderr
    assert "best " in result.stderr
    assert "search: " not in result.stdout


def test_the_page_of_a_real_run_is_whole(finished) -> None:
    _, out = finished
    text = (out / "report.html").read_text()
    assert text.endswith("</html>")
    for name in ("alpha", "beta", "gamma", "Against the controls", "say g h:", 'class="best"'):
        assert name in text


def test_json_prints_one_object_that_holds_the_report(search_options: list[str], tmp_path: Path, call) -> None:
    done = call(*search_options, "--controls", "none", "--out", str(tmp_path / "run"), "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["folder"] == str(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {name: printed[name] for name in saved} == saved
    assert "Loading weights" not in done.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(search_options: list[str], tmp_path: Path) -> None:
    result = invoke(*search_options, "--dry-run", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.stderr
    assert "minutes at most" in result.stdout
    assert "alpha" in result.stdout
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(invoke(*search_options, "--dry-run", "--json").stdout)
    assert [adapter["name"] for adapter in plan["adapters"]] == ["alpha", "beta", "gamma"]
    assert plan["budget_forward_equivalents"] == 30


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--base", "--bank", "--examples", "--demo TASK", "--out"]),
        (["--base", "x", "--bank", "/nowhere", "--examples", "/no.jsonl", "--out", "o"], ["/nowhere", "/no.jsonl"]),
        (["--demo", "x", "--base", "y", "--out", "o"], ["--demo brings its own files", "--base"]),
        (["--demo", "x", "--shots", "0", "--draw", "-1", "--out", "o"], ["--shots must be at least 1", "--draw"]),
        (["--demo", "x", "--out", "o", "--resume", "--force"], ["--resume", "--force"]),
        (["--demo", "x", "--resume", "--dry-run"], ["nothing to --resume"]),
        (["--demo", "x", "--out", "/tmp"], ["/tmp exists", "--force"]),
        (["--base", "x", "--shots", "3", "--dry-run"], ["--shots", "goes with --demo only"]),
    ],
)
def test_bad_options_are_all_reported_before_anything_is_loaded(options: list[str], words: list[str]) -> None:
    result = invoke("search", *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--strategy", "cmaa", ["unknown search strategy 'cmaa'", "did you mean 'cma'"]),
        ("--layers", "some", ["--layers", "'some'"]),
        ("--layers", "0", ["layers"]),
        ("--budget", "0", ["budget must be at least 1"]),
        ("--candidates", "0", ["candidates must be at least 1"]),
        ("--l1", "-1", ["l1 must not be negative"]),
        ("--controls", "base,nonsense", ["nonsense", "best_single"]),
        ("--device", "warp", ["--device 'warp'", "cuda"]),
        ("--preselect", "magic", ["magic", "loss"]),
        ("--combine", "sum", ["outputs"]),
    ],
)
def test_bad_values_name_what_is_allowed(
    search_options: list[str], tmp_path: Path, option: str, value: str, words: list[str]
) -> None:
    result = invoke(*search_options, "--out", str(tmp_path / "run"), option, value)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_lines_of_examples_are_reported_with_their_numbers(search_options: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "a", "output": "b"}\n{"input": 3}\nnot json\n')
    options = [str(bad) if word.endswith("few.jsonl") else word for word in search_options]
    result = invoke(*options, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert f"{bad}:2:" in result.stderr
    assert f"{bad}:3:" in result.stderr
    assert f"{bad}:1:" not in result.stderr


def test_an_existing_folder_is_kept_unless_forced(search_options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious").write_text("x")
    result = invoke(*search_options, "--out", str(out))
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert (out / "precious").read_text() == "x"


def test_layers_and_controls_are_translated() -> None:
    def settings(**options):
        return SearchRequest(**{**DEFAULTS, "demo": "x", "base": None, "dry_run": True, **options}).settings()

    assert settings(layers="3").layers == 3
    assert settings(layers="each").layers == "each"
    assert settings().controls is None
    assert settings(controls="none").controls == ()
    assert "trained_lora" in settings(controls="all").controls
    assert settings(controls="base, best-single").controls == ("base", "best_single")
    with pytest.raises(ComposeError, match="layers"):
        settings(layers="-1")


def test_the_resume_command_is_the_call_again(tmp_path: Path) -> None:
    request = SearchRequest(**{**DEFAULTS, "demo": "x", "base": None, "out": tmp_path / "run"})
    arguments = ["search", "--demo", "x", "--out", str(tmp_path / "run"), "--force"]
    assert "nothing was saved" in resume_command(request, arguments)
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "events.jsonl").write_text("{}\n")
    text = resume_command(request, arguments)
    assert text.endswith(f"compose search --demo x --out {tmp_path / 'run'} --resume")
    assert str(partial) in text


@pytest.mark.slow
def test_ctrl_c_saves_exits_with_130_and_the_printed_command_finishes_the_run(
    search_options: list[str], tmp_path: Path, start_compose
) -> None:
    """Interrupted once the journal has lines; resumed, it ends with the weights of an uninterrupted run."""
    options = [*search_options[:-2], "--strategy", "random", "--budget", "150", "--controls", "none", "--l1", "0"]
    out = tmp_path / "run"
    process = start_compose(*options, "--out", out)
    journal = tmp_path / "run.partial" / "events.jsonl"
    deadline = time.monotonic() + 300
    while (not journal.exists() or journal.stat().st_size < 1000) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, process.stderr
    assert process.stdout == ""
    assert "Traceback" not in process.stderr
    assert f"--out {out} --resume" in process.stderr
    assert journal.stat().st_size >= 1000
    assert not out.exists()
    for arguments in (["--out", str(out), "--resume"], ["--out", str(tmp_path / "whole")]):
        result = invoke(*options, *arguments)
        assert result.exit_code == 0, result.output
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("run", "whole"))
    assert first["weights"] == second["weights"]
    assert first["search"]["history"] == second["search"]["history"]


@pytest.fixture(scope="module")
def retriever_folder(workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved retriever over hidden states of the tiny base."""
    from compose.cli.loading import load_base
    from compose.retriever.encoders import HiddenStateEncoder
    from compose.retriever.retriever import Retriever

    loaded = load_base(str(workspace.base), device="cpu", dtype="auto")
    texts = {"alpha": ["zzz", "zz"], "beta": ["say a b:", "say x y:"], "gamma": ["say q r:", "say c c:"]}
    encoder = HiddenStateEncoder(loaded.model, loaded.tokenizer)
    return Retriever.fit(encoder, texts, "mean").save(tmp_path_factory.mktemp("retriever") / "saved")


def test_candidates_are_preselected_by_a_saved_retriever(search_options, retriever_folder, tmp_path: Path) -> None:
    options = ["--preselect", "embedding", "--retriever", str(retriever_folder), "--candidates", "2"]
    result = invoke(*search_options, *options, "--controls", "none", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["search"]["preselection_cost"] == 0
    assert report["weights"]["adapters"] == ["beta", "gamma"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preselect", "embedding"], "needs --retriever FOLDER"),
        (["--preselect", "embedding", "--retriever", "/nowhere"], "no such folder: /nowhere"),
        (["--retriever", "/"], "--retriever goes with --preselect embedding"),
        (["--preselect", "embedding", "--retriever", "/", "--candidates", "2"], "no retriever.json in /"),
    ],
)
def test_a_retriever_that_cannot_preselect_is_refused(search_options, options, message, tmp_path: Path) -> None:
    result = invoke(*search_options, *options, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []
