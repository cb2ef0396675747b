"""``compose generate``: the selection really is in force, and weights come from where they are said to."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from compose.bank import Bank
from compose.cli.chosen_weights import read_weights
from compose.cli.main import build_app
from compose.engine.attach import attach
from compose.errors import ComposeError, IncompatibleError


def generate(workspace, *arguments: object, bank: Path | None = None, stdin: str | None = None):
    options = ["generate", "--base", str(workspace.base), "--bank", str(bank or workspace.bank), "--json"]
    words = [*options, "--max-new-tokens", "6", *map(str, arguments)]
    return CliRunner().invoke(build_app(), words, input=stdin, env={"COLUMNS": "200"})


def texts(result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [item["text"] for item in json.loads(result.stdout)["outputs"]]


def test_an_adapter_changes_the_answer_and_equals_weight_one(workspace, strong: Path) -> None:
    prompt = ("--prompt", "say a b:")
    base = texts(generate(workspace, *prompt, bank=strong))
    one = texts(generate(workspace, *prompt, "--adapter", "one", bank=strong))
    two = texts(generate(workspace, *prompt, "--adapter", "two", bank=strong))
    assert len({*base, *one, *two}) == 3
    assert texts(generate(workspace, *prompt, "--weights", '{"one": 1.0}', bank=strong)) == one
    assert texts(generate(workspace, *prompt, "--weights", '{"two": 1.0, "one": 0.0}', bank=strong)) == two
    assert texts(generate(workspace, *prompt, "--weights", '{"one": 0.0}', bank=strong)) == base


def test_prompts_come_from_options_arguments_and_stdin(workspace) -> None:
    result = generate(workspace, "--prompt", "a", "b", "-", stdin="c d\n\ne\n")
    assert [item["prompt"] for item in json.loads(result.stdout)["outputs"]] == ["a", "b", "c d", "e"]


def test_without_json_the_text_alone_is_printed(workspace) -> None:
    words = ["generate", "--base", str(workspace.base), "--prompt", "a b", "--max-new-tokens", "3"]
    result = CliRunner().invoke(build_app(), words)
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == texts(generate(workspace, "--prompt", "a b", "--max-new-tokens", "3"))[0]


def report(workspace, groups: int, hashes: dict[str, str]) -> dict:
    values = [[0.5 * (group + 1), 0.0, -1.0] for group in range(groups)]
    return {
        "schema_version": 1,
        "settings": {"combine": "outputs"},
        "bank": {"adapters": [{"name": name, "sha256": digest} for name, digest in hashes.items()]},
        "weights": {"adapters": ["alpha", "beta", "gamma"], "groups": ["x"] * groups, "values": values},
    }


def test_weights_of_a_run_are_read_with_their_layer_groups(workspace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bank = Bank.open(workspace.bank)
    (tmp_path / "report.json").write_text(json.dumps(report(workspace, 2, dict(bank.hashes))))
    chosen = read_weights(str(tmp_path))
    assert chosen.names == ("alpha", "beta", "gamma")
    with attach(AutoModelForCausalLM.from_pretrained(workspace.base), chosen.select(bank)) as attached:
        coefficients = chosen.on(attached)
    torch.testing.assert_close(coefficients.values, torch.tensor([[0.5, 0.0, -1.0], [1.0, 0.0, -1.0]]))
    assert coefficients.groups["model.layers.1.self_attn.q_proj"] == 1
    assert coefficients.groups["model.layers.0.self_attn.q_proj"] == 0


def test_scalar_weights_of_a_run_leave_unused_adapters_out(workspace, tmp_path: Path) -> None:
    hashes = dict(Bank.open(workspace.bank).hashes)
    (tmp_path / "report.json").write_text(json.dumps(report(workspace, 1, hashes)))
    chosen = read_weights(str(tmp_path / "report.json"))
    assert (chosen.names, chosen.values) == (("alpha", "gamma"), ((0.5, -1.0),))


def test_weights_found_with_other_files_are_refused(workspace, tmp_path: Path) -> None:
    hashes = {**Bank.open(workspace.bank).hashes, "gamma": "0" * 64}
    (tmp_path / "report.json").write_text(json.dumps(report(workspace, 1, hashes)))
    result = generate(workspace, "--prompt", "a", "--weights", tmp_path)
    assert result.exit_code == 2
    assert "'gamma'" in result.stderr
    with pytest.raises(IncompatibleError, match="other files"):
        read_weights(str(tmp_path)).select(Bank.open(workspace.bank))


def test_a_run_that_kept_the_base_model_selects_nothing(workspace, tmp_path: Path) -> None:
    kept = report(workspace, 1, {})
    kept["weights"]["values"] = [[0.0, 0.0, 0.0]]
    (tmp_path / "report.json").write_text(json.dumps(kept))
    assert read_weights(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nowhere", "no such file"),
        ("{", "not valid JSON"),
        ("{}", "expected"),
        ('{"a": "x"}', "must be a finite number"),
        ('{"a": NaN}', "must be a finite number"),
        ('{"a": true}', "must be a finite number"),
        ('{"schema_version": 1}', "not a report"),
    ],
)
def test_bad_weights_are_refused(source: str, words: str) -> None:
    with pytest.raises(ComposeError, match=words):
        read_weights(source)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no prompts", "--prompt"]),
        (["--prompt", " "], ["empty"]),
        (["--prompt", "a", "--adapter", "x", "--weights", "y"], ["--adapter", "--weights"]),
        (["--prompt", "a", "--adapter", "alphaa"], ["unknown adapter 'alphaa'", "did you mean 'alpha'"]),
    ],
)
def test_bad_calls_are_refused(workspace, arguments: list[str], words: list[str]) -> None:
    result = generate(workspace, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr


def test_selecting_without_a_bank_or_base_is_refused(workspace) -> None:
    app = build_app()
    result = CliRunner().invoke(app, ["generate", "--base", str(workspace.base), "--adapter", "x", "--prompt", "a"])
    assert (result.exit_code, "--bank" in result.stderr) == (2, True)
    result = CliRunner().invoke(app, ["generate", "--prompt", "a"])
    assert (result.exit_code, "--base" in result.stderr) == (2, True)
