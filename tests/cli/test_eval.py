"""``compose eval``: from trained routers to rows, verdicts and a page; interrupted comparisons, refusals."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli import eval_run
from compose.cli.eval_request import router_folders
from compose.cli.main import build_app
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS
from compose.errors import ComposeError
from compose.evaluation import compare as compare_module
from compose.evaluation.result import row_from_json
from compose.routers.trace import RoutingTrace

PAIRS = {"alpha": [("say a b:", "b a"), ("say c d:", "d c")], "other": [("sort b a:", "a b"), ("sort d c:", "c d")]}


def invoke(*words: object):
    return CliRunner().invoke(build_app(), [str(word) for word in words], env={"COLUMNS": "160"})


def write(path: Path, which: slice, prefix: str = "") -> Path:
    lines = [
        {"task": task, "prompt": prefix + given, "response": wanted}
        for task, pairs in PAIRS.items()
        for given, wanted in pairs[which]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Records that are scored, that choose, and that are trained on."""
    root = tmp_path_factory.mktemp("records")
    return {
        "test": write(root / "test.jsonl", slice(0, 1)),
        "choose": write(root / "choose.jsonl", slice(1, 2)),
        "train": write(root / "train.jsonl", slice(0, 2), "well "),
    }


@pytest.fixture(scope="module")
def routers(workspace, files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds of a router over the bank, and one with experts of its own."""
    root = tmp_path_factory.mktemp("routers")
    options = ["train", "--base", workspace.base, "--data", files["train"], "--steps", "1", "--batch-size", "4"]
    for words in (
        ["--preset", "xlora", "--bank", workspace.bank, "--seed", "3", "--seed", "4", "--out", root / "xlora"],
        ["--preset", "molora", "--set", "num_experts=2", "--set", "rank=1", "--out", root / "molora"],
    ):
        result = invoke(*options, *words)
        assert result.exit_code == 0, result.output
    return {name: root / name for name in ("xlora", "molora")}


@pytest.fixture
def options(workspace, files, routers) -> list[object]:
    inputs = ["--base", workspace.base, "--bank", workspace.bank, "--data", files["test"]]
    return ["eval", *inputs, "--router", routers["xlora"], "--merges", "sum", "--merge-rank", 4]


def read_rows(folder: Path) -> list:
    return [row_from_json(json.loads(line)) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_routers_are_compared_and_everything_is_written(options, files, routers, tmp_path) -> None:
    out = tmp_path / "out"
    more = ["--choose", files["choose"], "--train", files["train"], "--seed", 0, "--router", routers["molora"]]
    result = invoke(*options, *more, "--out", out)
    assert result.exit_code == 0, result.output
    rows = read_rows(out)
    assert [(row.name, row.seed) for row in rows if row.kind == "router"] == [
        ("xlora", 3),
        ("xlora", 4),
        ("molora", 0),
    ]
    assert {"base", "uniform average", "oracle adapters", "best merge"} <= {row.name for row in rows}
    assert {"xlora: mean gates, told the task", "xlora: gates in random order"} <= {row.name for row in rows}
    counts = json.loads((routers["xlora"] / "seed-3" / "train.json").read_text())["trained_parameters"]
    assert next(row for row in rows if row.name == "xlora").trained == counts["router"] > 0
    plain = json.loads((out / "result.json").read_text())
    names = [one["name"] for one in plain["contenders"]]
    assert names == list(dict.fromkeys(row.name for row in rows))
    assert {one["name"]: one["seeds"] for one in plain["contenders"]}["xlora"] == 2
    assert plain["one_lora"]["stages"][0]["steps"] == 1
    assert any("xlora was scored with 2 seed(s)" in line for line in plain["verdicts"])
    assert plain["verdicts"]
    assert all(f"! {line}" in result.stdout for line in plain["verdicts"])
    assert all(name in result.stdout for name in ("alpha", "other", "one LoRA of rank 1"))
    trace = RoutingTrace.load(out / "trace.json")
    assert trace.about["preset"] == "xlora"
    assert trace.seen_tasks() == ("alpha", "other")
    page = (out / "report.html").read_text()
    assert "oracle task gate" in page
    assert "Loss over steps" not in page  # one step is no course
    if importlib.util.find_spec("matplotlib") is not None:
        assert (out / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out.partial").exists()


def test_an_interrupted_comparison_goes_on_where_it_was(options, files, tmp_path, monkeypatch) -> None:
    words = [*options, "--choose", files["choose"]]
    whole = invoke(*words, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    out, real = tmp_path / "out", eval_run.note
    said = []

    def interrupted(text: str, *more: str) -> None:
        said.append(text)
        if len(said) == 5:
            raise KeyboardInterrupt
        real(text, *more)

    monkeypatch.setattr(eval_run, "note", interrupted)
    monkeypatch.setattr("sys.argv", ["compose", *map(str, words), "--out", str(out)])
    stopped = invoke(*words, "--out", out)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert f"finished rows are in {out}.partial" in stopped.stderr
    assert not out.exists()
    monkeypatch.setattr(eval_run, "note", real)
    refused = invoke(*words, "--out", out)
    assert refused.exit_code == 2
    assert "--resume continues it" in refused.stderr
    other = invoke(*words, "--out", out, "--resume", "--merge-rank", 2)
    assert other.exit_code == 2
    assert "comparison of other routers, records, adapters or settings" in other.stderr
    scored, real_score = [], compare_module.score
    monkeypatch.setattr(compare_module, "score", lambda *given: scored.append(1) or real_score(*given))
    with (tmp_path / "out.partial" / "events.jsonl").open("a") as stream:
        stream.write('{"name": "cut sh')  # a line that a crash cut short
    resumed = invoke(*words, "--out", out, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert len(scored) == len(read_rows(out)) - 5


def test_what_is_missing_is_told_and_what_is_there_is_compared(workspace, files, routers, tmp_path) -> None:
    inputs = ["--base", workspace.base, "--router", routers["molora"], "--data", files["test"]]
    result = invoke("eval", *inputs, "--no-ablations", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [row.name for row in read_rows(tmp_path / "out")] == ["molora"]
    for words in ("no --bank", "no --choose", "no --train"):
        assert words in result.stderr


def test_one_lora_may_be_trained_otherwise(options, files, tmp_path) -> None:
    words = [*options, "--train", files["train"], "--no-ablations", "--seed", 5, "--steps", 2, "--lr", 0.01]
    result = invoke(*words, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert plain["one_lora"]["stages"] == [
        {"name": "train", "steps": 2, "epochs": None, "learning_rate": 0.01, "schedule": "constant"}
    ]
    assert plain["one_lora"]["settings"]["batch_size"] == 4
    (lora,) = [row for row in read_rows(tmp_path / "out") if row.kind == "baseline"]
    assert lora.seed == 5


def test_records_that_were_used_are_told(options, files) -> None:
    result = invoke(*options, "--choose", files["test"], "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert plain["warnings"] == ["2 of 2 scored records are in --choose as well: scores look too good"]
    assert plain["merges"] == ["sum"]
    assert plain["one_lora"] is None


def test_a_plan_is_printed(options, files) -> None:
    result = invoke(*options, "--train", files["train"], "--dry-run")
    assert result.exit_code == 0, result.output
    assert "xlora (seed 3), xlora (seed 4)" in result.stdout
    assert "train: 1 steps at 0.001 (constant), seeds 0, 1, 2" in result.stdout


def test_a_folder_that_is_there_stays(options, tmp_path) -> None:
    result = invoke(*options, "--out", tmp_path)
    assert result.exit_code == 2
    assert "pass --force to replace it" in result.stderr


def test_runs_alike_but_for_their_seed_are_one_contender(routers, tmp_path) -> None:
    found = router_folders([routers["xlora"] / "seed-4", routers["molora"], routers["xlora"] / "seed-3"])
    assert [(one.name, one.seed) for one in found] == [("xlora", 4), ("xlora", 3), ("molora", 0)]
    with pytest.raises(ComposeError, match="trained alike with seed 4; leave one"):
        router_folders([routers["xlora"], routers["xlora"] / "seed-4"])
    longer = tmp_path / "longer"
    longer.mkdir()
    for file in (routers["xlora"] / "seed-3").iterdir():
        (longer / file.name).write_bytes(file.read_bytes())
    recipe = json.loads((longer / "recipe.json").read_text())
    recipe["stages"][0]["steps"] = 9
    (longer / "recipe.json").write_text(json.dumps(recipe))
    names = [one.name for one in router_folders([routers["xlora"], longer])]
    assert names == [f"xlora ({routers['xlora'] / 'seed-3'})"] * 2 + [f"xlora ({longer})"]


def test_a_router_saved_without_a_run_needs_to_be_told_how_one_lora_trains(options, files, routers, tmp_path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("mixture.json", "router.safetensors"):
        (bare / name).write_bytes((routers["xlora"] / "seed-3" / name).read_bytes())
    (found,) = router_folders([bare])
    assert (found.seed, found.trained) == (0, None)
    words = [bare if word == routers["xlora"] else word for word in options]
    refused = invoke(*words, "--train", files["train"], "--dry-run")
    assert refused.exit_code == 2
    assert "give --recipe FILE or --steps N" in refused.stderr
    assert invoke(*words, "--train", files["train"], "--steps", 1, "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "--force"], "give one of them"),
        (["--steps", "3"], "--steps is for the one LoRA, which needs --train FILE"),
        (["--choose", "none.jsonl"], "--choose: no such file or folder: none.jsonl"),
        (["--bank", "/nowhere"], "--bank: no such folder"),
        (["--merges", "tise"], "did you mean 'ties'"),
        (["--merges", ","], "--merges names none"),
        (["--router", "/nowhere"], "holds no mixture.json"),
        (["--column", "prompt"], "write FIELD=NAME"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(words, message, options, tmp_path) -> None:
    result = invoke(*options, *words, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_missing_is_told_at_once(workspace, files, routers) -> None:
    result = invoke("eval")
    assert result.exit_code == 2
    for words in ("missing --base MODEL", "missing --router DIR", "missing --data FILE", "missing --out DIR"):
        assert words in result.stderr
    no_bank = ["eval", "--base", workspace.base, "--router", routers["xlora"], "--data", files["test"], "--dry-run"]
    result = invoke(*no_bank)
    assert result.exit_code == 2
    assert "stands over a bank of adapters; give --bank DIR" in result.stderr


@pytest.mark.slow
def test_it_runs_on_the_demo(tmp_path) -> None:
    files, names = {}, ("sum", "add_one", "largest")
    for split in ("train", "shots", "test"):
        files[split] = tmp_path / f"{split}.jsonl"
        lines = [
            json.dumps({"task": name, "prompt": item.input, "response": item.output, "expert": name})
            for name in names
            for item in TASKS[name].sample(0, 3, split)
        ]
        files[split].write_text("\n".join(lines) + "\n")
    inputs = ["--base", demo_base(), *(word for name in names for word in ("--bank", demo_bank() / name))]
    training = ["--data", files["train"], "--preset", "meteora", "--steps", 4, "--batch-size", 9, "--lr", "0.05"]
    assert invoke("train", *inputs, *training, "--out", tmp_path / "run").exit_code == 0
    words = [
        "--router",
        tmp_path / "run",
        "--data",
        files["test"],
        "--choose",
        files["shots"],
        "--train",
        files["train"],
    ]
    result = invoke("eval", *inputs, *words, "--seed", 0, "--merges", "sum", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = {row.name: row for row in read_rows(tmp_path / "out")}
    assert rows["oracle adapters"].exact > rows["base"].exact
    assert rows["oracle adapters"].loss < rows["meteora"].loss < rows["base"].loss
    assert "Loss over steps" in (tmp_path / "out" / "report.html").read_text()
