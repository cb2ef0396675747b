"""Recipes of ``compose merge``: YAML without traps, keys, what beats what, paths, merges repeated from merge.json."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli.main import build_app
from compose.cli.merge_recipe import KEYS, MergeRequest, read_recipe, read_request
from compose.errors import ComposeError
from compose.formats.peft import read_adapter
from compose.text.yaml_file import MOST_BYTES, read_yaml


def merge(*arguments: object):
    return CliRunner().invoke(build_app(), ["merge", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: sum\nmethod: ties", "duplicate key 'method'"),
        ("weights: {a: 1, a: 2}", "duplicate key 'a'"),
        ("method: &x sum\nout: *x", "aliases"),
        ("options: &x {a: 1}\nweights:\n  <<: *x", "aliases"),
        ("weights: {no: 1}", "put it in quotes"),
        ("- method", "mapping"),
        ("", "got nothing"),
        ("method: !!python/name:os.system {}", "tags .* are not allowed"),
        ("method: [", "not a recipe"),
        ("method: sum\n---\nmethod: ties", "single document"),
        ("{" * 5000, "64 levels deep"),
        ("metod: ties", "did you mean 'method'"),
        ("method: ties\nmerge_method: ties", "the same key"),
        ("rank: 2.5", "'rank' must be an integer, got 2.5"),
        ("rank: true", "'rank' must be an integer, got True"),
        ("weights: {a: b}", "'weights' must be a mapping of names to numbers"),
        ("space: cores", "'space' must be full, knots or core, got 'cores'"),
        ("bank: []", "'bank' must be a path or a list"),
        ("parents: 3", "merge.json"),
    ],
)
def test_bad_recipes_are_refused_with_the_reason(recipe, text, message) -> None:
    with pytest.raises(ComposeError, match=message) as caught:
        read_recipe(recipe(text))
    assert "recipe.yaml" in str(caught.value)


def test_a_laughing_or_large_recipe_costs_nothing(recipe) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(ComposeError, match="aliases"):
        read_yaml(recipe("\n".join(lines)))
    with pytest.raises(ComposeError, match="at most"):
        read_yaml(recipe("#" * (MOST_BYTES + 1)))
    with pytest.raises(ComposeError, match="no such file"):
        read_yaml(Path("nowhere.yaml"))


def test_all_problems_of_a_recipe_are_told_at_once(recipe) -> None:
    with pytest.raises(ComposeError, match=r"unknown key 'outt'.*'seed' must be an integer"):
        read_recipe(recipe("outt: x\nseed: many"))


def test_numbers_in_scientific_notation_are_numbers(recipe) -> None:
    assert read_yaml(recipe("a: 1e-3\nb: -2E+1\nc: 3")) == {"a": 0.001, "b": -20.0, "c": 3}


def test_every_key_is_read_and_paths_start_at_the_recipe(recipe, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    text = (
        "bank: [one, two]\nmerge_method: ties\nweights: {a: 1, b: {'*': 2, '*.v': 3}}\nspace: core\n"
        "options: {density: 0.3}\nrank: 4\nenergy: 0.9\nseed: 5\ndevice: cpu\nbase: model\ninto_base: org/name\n"
        "data: d.jsonl\nout: merged\n"
    )
    found = read_request(recipe(text), {}, [])
    assert found == MergeRequest(
        bank=(tmp_path / "one", tmp_path / "two"), method="ties", weights={"a": 1, "b": {"*": 2, "*.v": 3}},
        space="core", options={"density": 0.3}, rank=4, energy=0.9, seed=5, device="cpu", base=str(tmp_path / "model"),
        into_base="org/name", data=tmp_path / "d.jsonl", out=tmp_path / "merged",
    )  # fmt: skip
    assert set(KEYS) == set(MergeRequest.__dataclass_fields__) - {"hashes"}
    assert read_request(None, {}, []) == MergeRequest()


def test_options_beat_the_recipe_and_set_beats_anything_in_it(recipe) -> None:
    file = recipe("bank: b\nmethod: ties\nweights: 0.5*x - y\noptions: {density: 0.3, scale: 2}\nrank: 4\nseed: 1")
    found = read_request(file, {"method": "dare", "rank": None, "options": {"density": 0.1}}, [])
    assert (found.method, found.rank, found.options) == ("dare", 4, {"density": 0.1, "scale": 2})
    settings = ["rank=8", "options.density=0.7", "elect=count", "weights.x=2", "weights.y:*.q=3", "out=o", "seed=none"]
    found = read_request(file, {}, settings)
    assert (found.rank, found.seed, found.out) == (8, 0, Path("o"))
    assert found.options == {"density": 0.7, "scale": 2, "elect": "count"}
    assert found.weights == {"x": 2, "y": {"*": -1.0, "*.q": 3}}
    assert read_request(file, {"weights": {"z": 1.0}}, []).weights == {"z": 1.0}
    assert read_request(file, {}, ["weights=0.1*k"]).weights == {"k": 0.1}


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"rank": 3}, ["rank=4"], "'rank' is given twice"),
        ({"options": {"density": 0.1}}, ["density=0.2"], "'density' is given twice"),
        ({}, ["density=0.2", "options.density=0.3"], "'density' is given twice"),
        ({}, ["wieghts.a=1"], "did you mean 'weights'"),
        ({}, ["rank.x=1"], "has no parts"),
        ({}, ["rank=many"], "'rank' must be an integer, got 'many'"),
        ({}, ["weights.a=b"], "a weight is a number"),
        ({}, ["density"], "cannot read --set"),
    ],
)
def test_settings_that_cannot_be_are_refused(given, settings, message) -> None:
    with pytest.raises(ComposeError, match=message):
        read_request(None, given, settings)


def test_a_recipe_merges_beside_itself(workspace, recipe, tmp_path) -> None:
    file = recipe(f"bank: {workspace.bank}\nweights: {{alpha: 0.5, beta: {{'*': 1, '*.v_proj': -2}}}}\nout: merged")
    result = merge("-c", file, "--set", "rank=3")
    assert result.exit_code == 0, result.stderr
    options = ["--weight", "alpha=0.5", "--weight", "beta=1", "--weight", "beta:*.v_proj=-2", "--rank", "3"]
    assert merge("--bank", workspace.bank, *options, "--out", tmp_path / "same").exit_code == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("merged", "same")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "options", [["--method", "ties", "--space", "core"], ["--method", "dare", "--seed", "3", "--rank", "2"],
                ["--method", "orthogonal", "--weight", "alpha=1", "--weight", "beta:*.q_proj=-1"]],
)  # fmt: skip
def test_a_merge_is_repeated_from_its_own_recipe(workspace, tmp_path, options) -> None:
    first = merge("--bank", workspace.bank, *options, "--out", tmp_path / "first")
    assert first.exit_code == 0, first.stderr
    again = merge("-c", tmp_path / "first/merge.json", "--bank", workspace.bank, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    recipes = [json.loads((tmp_path / name / "merge.json").read_text()) for name in ("first", "again")]
    assert recipes[0] == recipes[1]


def test_a_written_recipe_refuses_other_adapters(workspace, tmp_path) -> None:
    assert merge("--bank", workspace.bank, "alpha", "--out", tmp_path / "first").exit_code == 0
    written = json.loads((tmp_path / "first/merge.json").read_text())
    assert read_adapter(workspace.bank / "alpha").sha256 == written["parents"][0]["sha256"]
    written["parents"][0]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(written))
    result = merge("-c", tmp_path / "other.json", "--bank", workspace.bank, "--out", tmp_path / "again")
    assert result.exit_code == 2
    assert "other files of alpha" in result.stderr
    assert not (tmp_path / "again").exists()
