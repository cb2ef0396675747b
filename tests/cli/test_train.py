"""``compose train``: from mixed records to a folder that opens again, interrupted runs, refusals."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compose.bank import Bank
from compose.cli.main import build_app
from compose.cli.train_request import TrainRequest, read_columns, read_options
from compose.cli.train_run import _sample
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS
from compose.engine.routed import open_routed
from compose.errors import ComposeError
from compose.fewshot.loading import load_model
from compose.routers.recipe import read_recipe
from compose.routers.records import MixedExample
from compose.routers.trace import RoutingTrace
from compose.text.examples import Example


def invoke(*arguments: object):
    return CliRunner().invoke(build_app(), list(map(str, arguments)), env={"COLUMNS": "200"})


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of two tasks in the tiny model's letters; one task has the name of an adapter."""
    file = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    words = ["a b", "c d", "e f", "g h", "i j", "k l"]
    records = [{"task": "alpha", "prompt": f"turn {word}:", "response": word[::-1]} for word in words]
    records += [{"task": "say", "prompt": f"say {word}:", "response": word, "cluster": 1} for word in words[:4]]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def inputs(workspace, mixed) -> list[str]:
    """The options of a small run over the bank, all but ``--out``."""
    return ["train", "--base", str(workspace.base), "--bank", str(workspace.bank), "--data", str(mixed),
            "--steps", "3", "--batch-size", "4"]  # fmt: skip


def read(folder: Path, name: str):
    text = (folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def test_a_run_over_a_bank_writes_a_folder_that_opens_again(inputs, workspace, tmp_path) -> None:
    result = invoke(*inputs, "--preset", "xlora", "--out", tmp_path / "run", "--lr", "0.01")
    assert result.exit_code == 0, result.output
    assert "step 3/3, loss" in result.stderr
    assert "entropy" in result.stderr
    assert str(tmp_path / "run") in result.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    run = {"mixture.json", "router.safetensors", "history.jsonl", "recipe.json", "train.json"}
    assert names == run | {"trace.json", "report.html"}
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    history = read(tmp_path / "run", "history.jsonl")
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert sum(history[-1]["tasks"].values()) == 12
    loaded = load_model(workspace.base)
    routed = open_routed(loaded.model, Bank.open(workspace.bank), tmp_path / "run")
    assert routed.spec.preset == "xlora"
    assert any(bool(parameter.any()) for parameter in routed.router.parameters())


def test_a_run_s_page_shows_what_its_router_decides(inputs, tmp_path) -> None:
    options = ["--preset", "meteora", "--set", "losses=[]", "--max-length", "9", "--truncate", "prompt_left"]
    result = invoke(*inputs, *options, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    trace = RoutingTrace.load(tmp_path / "run" / "trace.json")
    assert trace.seen_tasks() == ("alpha", "say")
    assert trace.overall().decisions == 10 * 9  # every record is cut to nine tokens
    assert trace.about["preset"] == "meteora"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Loss over steps" in page
    assert "10 that it was trained on" in page


def test_a_page_is_of_some_records_of_every_task() -> None:
    records = [MixedExample(Example("a", str(number)), f"task {number % 40}") for number in range(4000)]
    assert [record.example.output for record in _sample(records)[:7]] == ["0", "40", "80", "120", "160", "200", "1"]
    assert len(_sample(records)) == 240
    assert len(_sample(records[::40])) == 16


def test_labels_of_adapters_say_nothing_of_experts_made_anew(workspace, mixed, tmp_path) -> None:
    labelled = tmp_path / "labelled.jsonl"
    lines = [{**json.loads(line), "expert": "alpha"} for line in mixed.read_text().splitlines()]
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["train", "--base", workspace.base, "--preset", "mola", "--steps", 1, "--dry-run"]
    result = invoke(*options, "--data", labelled)
    assert result.exit_code == 0, result.output
    assert "expert labels (1 names) are left out" in result.stderr
    lines[0]["expert"] = "expert_0"  # a label that means something: then all have to
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = invoke(*options, "--data", labelled)
    assert result.exit_code == 2
    assert "labelled.jsonl:2: unknown expert 'alpha'" in result.stderr


def test_fresh_experts_need_no_bank(workspace, mixed, tmp_path) -> None:
    options = ["--base", workspace.base, "--data", mixed, "--preset", "mola", "--set", "num_experts=[2, 4]"]
    out = tmp_path / "run"
    result = invoke("train", *options, "--set", "rank=2", "--steps", 2, "--batch-size", 4, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    assert run["trained_parameters"]["experts"] > 0
    assert run["first"]["aux"].keys() == run["last"]["aux"].keys()
    loaded = load_model(workspace.base)
    routed = open_routed(loaded.model, None, out)
    assert routed.router.experts == ("expert_0", "expert_1", "expert_2", "expert_3")
    with torch.no_grad():
        assert routed(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_dry_run_prints_the_plan_and_writes_nothing(inputs, tmp_path) -> None:
    result = invoke(*inputs, "--preset", "lora_flow", "--dry-run", "--out", tmp_path / "run", "--seed", 0, "--seed", 1)
    assert result.exit_code == 0, result.output
    for words in ("alpha, beta, gamma", "per token, at 2 sites (block)", "10 of 2 tasks", "for each of 2 runs"):
        assert words in result.stdout
    assert list(tmp_path.iterdir()) == []
    plan = json.loads(invoke(*inputs, "--preset", "lora_flow", "--dry-run", "--json").stdout)
    assert plan["trained_parameters"] == {"router": 2 * (3 * 16 + 3), "experts": 0}
    assert plan["steps"] == 3
    assert sum(plan["stages"][0]["tasks"].values()) == 12
    assert plan["seconds_per_step"] > 0


def test_a_recipe_of_stages_and_seeds_repeats_itself(workspace, mixed, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
preset: molora
options: {{rank: 2, num_experts: 3, gate: {{std: 0.5}}}}
base: {workspace.base}
data: {mixed}
seeds: [1, 2]
batch_size: 4
stages:
  - {{name: experts, train: experts, steps: 2}}
  - {{name: both, train: both, steps: 1, learning_rate: 1e-2}}
out: run
"""
    )
    result = invoke("train", "-c", recipe, "--json")
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [run["folder"] for run in runs] == [str(tmp_path / "run" / f"seed-{seed}") for seed in (1, 2)]
    first, second = (tmp_path / "run" / f"seed-{seed}" for seed in (1, 2))
    assert [entry["stage"] for entry in read(first, "history.jsonl")] == ["experts", "experts", "both"]
    assert (first / "router.safetensors").read_bytes() != (second / "router.safetensors").read_bytes()
    result = invoke("train", "-c", second / "recipe.json", "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    for name in ("router.safetensors", "experts.safetensors", "history.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (second / name).read_bytes()
    assert read_recipe(second / "recipe.json").seeds == (2,)
    result = invoke("train", "-c", recipe, "--resume")  # both are done
    assert result.exit_code == 0, result.output
    assert invoke("train", "-c", recipe).exit_code == 2


def test_an_interrupted_run_continues_to_the_same_end(inputs, start_compose, tmp_path) -> None:
    options = [*inputs, "--preset", "mola", "--set", "rank=2", "--checkpoint-every", "2", "--accumulation", "2"]
    options[options.index("--steps") + 1] = "60"
    out = tmp_path / "run"
    process = start_compose(*options, "--out", out)
    checkpoints = tmp_path / "run.partial" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("step-*[4-9]")) and time.monotonic() < deadline:  # an earlier one is whole then
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, process.stderr
    assert "Traceback" not in process.stderr
    assert f"--out {out} --resume" in process.stderr
    assert not out.exists()
    refused = invoke(*options, "--out", out)
    assert refused.exit_code == 2
    assert "--resume continues it" in refused.stderr
    for arguments in (["--out", out, "--resume"], ["--out", tmp_path / "whole"]):
        result = invoke(*options, *arguments)
        assert result.exit_code == 0, result.output
    for name in ("router.safetensors", "experts.safetensors", "history.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not checkpoints.exists()


def test_bad_records_are_all_named_with_their_lines(workspace, tmp_path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"task": "t", "prompt": "a", "response": "b"}\n{"prompt": "a"}\nno json\n{"task": 1}\n')
    base = [
        "train",
        "--base",
        workspace.base,
        "--bank",
        workspace.bank,
        "--preset",
        "xlora",
        "--out",
        tmp_path / "run",
    ]
    result = invoke(*base, "--data", bad)
    assert result.exit_code == 2
    assert all(f"bad.jsonl:{line}:" in result.stderr for line in (2, 3, 4))
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "xlra"], "did you mean 'xlora'"),
        (["--preset", "xlora", "--set", "nois=1"], "did you mean 'noise'"),
        (["--preset", "xlora", "--set", "noise"], "write OPTION=VALUE"),
        (["--preset", "xlora", "--column", "prompt"], "write FIELD=NAME"),
        (["--preset", "arrow"], "trains nothing"),
        (["--preset", "dlp"], "text_embedding"),
        (["--preset", "xlora", "--resume", "--force"], "give one of them"),
        (["--preset", "mocle", "--set", "num_experts=2"], "6 records have none"),
        (["--preset", "meteora", "--data", "none"], "no such file or folder: none"),
        (["--preset", "xlora", "--batch-size", "5", "--accumulation", "2"], "multiple of accumulation"),
        ([], "preset is missing"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(options, words, inputs, tmp_path) -> None:
    result = invoke(*inputs, *options, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bank_or_an_out_folder_that_is_missing_is_told_together(workspace, mixed) -> None:
    result = invoke("train", "--base", workspace.base, "--data", mixed, "--preset", "lora_flow")
    assert result.exit_code == 2
    assert "give --bank DIR" in result.stderr
    assert "missing --out DIR" in result.stderr


def test_several_processes_are_refused(inputs, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke(*inputs, "--preset", "xlora", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "compose.routers.train" in result.stderr
    assert not (tmp_path / "run").exists()


def test_presets_are_listed() -> None:
    result = invoke("train", "--preset", "list")
    assert result.exit_code == 0
    assert "2402.07148" in result.stdout
    listed = json.loads(invoke("train", "--preset", "list", "--json").stdout)["presets"]
    (meteora,) = [one for one in listed if one["name"] == "meteora"]
    assert meteora["bank"]
    assert meteora["needs"] == ["expert_labels"]


def test_options_and_columns_are_read_from_words() -> None:
    assert read_options(["a=1", "b=0.5", "c=true", "d=[1, 2]", 'e={"k": 2}', "f=text"]) == {
        "a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": {"k": 2}, "f": "text",
    }  # fmt: skip
    assert read_columns(["prompt=question", "response=answer"]) == {"prompt": "question", "response": "answer"}
    with pytest.raises(ComposeError, match="given twice"):
        read_options(["a=1", "a=2"])


def test_what_to_say_of_an_interruption_before_the_first_checkpoint(workspace, mixed, tmp_path) -> None:
    given = {"preset": "mola", "base": str(workspace.base), "data": [mixed], "out": tmp_path / "run"}
    request = TrainRequest.read(
        None, given, device="cpu", checkpoint_every=1, resume=False, force=False, dry_run=False
    )
    assert "nothing was saved" in request.resume_command(["train"])


@pytest.mark.slow
def test_it_runs_on_the_demo(tmp_path) -> None:
    file = tmp_path / "mixed.jsonl"
    lines = [
        json.dumps({"task": name, "prompt": item.input, "response": item.output, "expert": name})
        for name in ("sum", "capitals", "dashes")
        for item in TASKS[name].sample(0, 8)
    ]
    file.write_text("\n".join(lines) + "\n")
    options = ["--base", demo_base(), "--bank", demo_bank(), "--data", file, "--batch-size", 4, "--steps", 3]
    result = invoke("train", *options, "--preset", "meteora", "--out", tmp_path / "run", "--lr", "0.05")
    assert result.exit_code == 0, result.output
    history = read(tmp_path / "run", "history.jsonl")
    assert history[-1]["aux"]["gate_ce"] < history[0]["aux"]["gate_ce"]
