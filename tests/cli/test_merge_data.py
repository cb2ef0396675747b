"""``compose merge --data``: records become batches of adapters, the model runs, the merge is written."""

import json

import pytest
from typer.testing import CliRunner

import compose
from compose.cli.main import build_app
from compose.engine.attach import attach
from compose.engine.data_merge import merge_with_data
from compose.fewshot.data_batches import data_batches
from compose.fewshot.loading import load_model
from compose.formats.peft import read_adapter
from compose.text.examples import Example

RECORDS = [
    ("say a b:", "b a", "alpha"),
    ("say c d:", "d c", "beta"),
    ("say e f:", "f e", "alpha"),
    ("g", "h", "gamma"),
]


def merge(*arguments: object):
    return CliRunner().invoke(build_app(), ["merge", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def data(tmp_path):
    lines = [json.dumps({"input": given, "output": wanted, "adapter": name}) for given, wanted, name in RECORDS]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize("method", ["regmean", "regmean_pp", "fisher", "cat"])
def test_the_command_merges_as_the_library_does(workspace, data, tmp_path, method) -> None:
    options = ["--bank", workspace.bank, "--base", workspace.base, "--data", data, "--method", method, "--rank", 4]
    result = merge(*options, "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert f"{method}: " in result.stderr
    loaded = load_model(workspace.base)
    examples: dict[str, list[Example]] = {}
    for given, wanted, name in RECORDS:
        examples.setdefault(name, []).append(Example(given, wanted))
    batches = {name: data_batches(loaded, found) for name, found in examples.items()}
    with attach(loaded.model, compose.Bank.open(workspace.bank)) as attached:
        expected = merge_with_data(attached, method, batches, rank=4).adapter
    found = read_adapter(tmp_path / "merged")
    for target, update in expected.targets.items():
        assert found.targets[target].delta().allclose(update.delta(), atol=1e-6), target
    recipe = json.loads((tmp_path / "merged/merge.json").read_text())
    assert recipe["method"] == method
    again = ["--bank", workspace.bank, "--base", workspace.base, "--data", data, "--out", tmp_path / "again"]
    result = merge("-c", tmp_path / "merged/merge.json", *again)
    assert result.exit_code == 0, result.stderr
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("merged", "again")]
    assert weights[0] == weights[1]


def test_adapters_without_a_weight_and_their_data_take_no_part(workspace, data, tmp_path) -> None:
    options = ["--bank", workspace.bank, "--base", workspace.base, "--data", data, "--method", "regmean"]
    result = merge(*options, "alpha + 0.5*beta", "--out", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    recipe = json.loads((tmp_path / "merged/merge.json").read_text())
    assert [(one["name"], one["weight"]) for one in recipe["parents"]] == [("alpha", 1.0), ("beta", 0.5)]
    assert set(recipe["data"]) == {"alpha", "beta"}


def test_every_bad_record_is_named_and_nothing_is_written(workspace, tmp_path) -> None:
    lines = [
        {"input": "a", "output": "b", "adapter": "alpha"},
        {"input": "a", "output": "b"},
        {"input": "a", "output": "b", "adapter": "alhpa"},
        {"input": "a", "output": "b", "adapter": "beta", "task": "beta"},
        {"input": "a", "adapter": "beta"},
        {"input": "a", "output": "b", "adapter": 3},
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\nnonsense\n")
    options = ["--bank", workspace.bank, "--base", workspace.base, "--method", "regmean", "--out", tmp_path / "out"]
    result = merge(*options, "--data", tmp_path / "bad.jsonl")
    assert result.exit_code == 2
    for number, reason in {
        2: "exactly one of 'adapter' or 'task'",
        3: "did you mean 'alpha'",
        4: "both 'adapter' and 'task'",
        5: "'output' or 'response'",
        6: "must be a string",
        7: "not valid JSON",
    }.items():
        assert any(f"bad.jsonl:{number}: " in line and reason in line for line in result.stderr.splitlines()), number
    assert "bad.jsonl:1:" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "regmean"], "give --data FILE and --base MODEL"),
        (["--method", "cat", "--base", "BASE"], "give --data FILE ("),
        (["--method", "sum", "--data", "DATA"], "'sum' takes no data"),
        (["--method", "regmean", "--data", "DATA", "--base", "BASE", "--space", "core"], "no variant in the core"),
        (["--method", "cat", "--data", "DATA", "--base", "BASE", "--set", "epohcs=2"], "no option 'epohcs'"),
        (["--method", "regmean", "--data", "DATA", "--base", "BASE", "--rank", "0"], "at least 1"),
    ],
)
def test_what_is_missing_or_too_much_is_told(workspace, data, tmp_path, options, message) -> None:
    places = {"BASE": workspace.base, "DATA": data}
    result = merge("--bank", workspace.bank, *(places.get(word, word) for word in options), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_plan_with_data_says_what_it_does_not_count(workspace, data) -> None:
    options = ["--bank", workspace.bank, "--base", workspace.base, "--data", data, "--method", "cat", "--dry-run"]
    result = merge(*options)
    assert result.exit_code == 0, result.stderr
    assert "beside it the model" in result.stdout
