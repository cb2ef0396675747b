"""Recipes of training runs: every key, what beats what, problems all at once, recipes written and read back."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from compose.errors import ComposeError
from compose.routers.recipe import SINGLE_STAGE, TrainRecipe, read_recipe
from compose.routers.sampling import Sampling
from compose.routers.stages import Stage

WHOLE = """
preset: meteora
options: {top_k: 2, gate: {init: normal}}
base: model
bank: ../bank
data: [one.jsonl, /two]
columns: {prompt: question, response: answer}
out: run
seeds: [0, 7]
sampling: {by: temperature, temperature: 2, batch: homogeneous}
batch_size: 32
accumulation: 4
max_length: 128
truncate: prompt_left
precision: bfloat16
stages:
  - {name: router, train: router, steps: 300, learning_rate: 1e-3, schedule: cosine, warmup: 30, final: 0.1}
  - name: joint
    train: both
    epochs: 0.5
    expert_learning_rate: 1.0e-5
    sampling: {batch: balanced}
    batch_size: 8
    accumulation: 2
    tasks: [math, code]
    experts: e1
"""
LEAST = "preset: molora\nbase: org/model\ndata: d.jsonl\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_every_key_is_read_and_paths_start_at_the_recipe(recipe, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    found = read_recipe(recipe(WHOLE))
    assert found == TrainRecipe(
        preset="meteora",
        options={"top_k": 2, "gate": {"init": "normal"}},
        base=str(tmp_path / "model"),
        bank=(tmp_path / ".." / "bank",),
        data=(tmp_path / "one.jsonl", Path("/two")),
        columns={"prompt": "question", "response": "answer"},
        out=tmp_path / "run",
        seeds=(0, 7),
        sampling=Sampling(by="temperature", temperature=2.0, batch="homogeneous"),
        batch_size=32,
        accumulation=4,
        max_length=128,
        truncate="prompt_left",
        precision="bfloat16",
        stages=(
            Stage(
                name="router", train="router", steps=300, learning_rate=1e-3, schedule="cosine", warmup=30, final=0.1
            ),
            Stage(
                name="joint", train="both", epochs=0.5, expert_learning_rate=1e-5, batch_size=8, accumulation=2,
                sampling=Sampling(batch="balanced"), tasks=("math", "code"), experts=("e1",),
            ),
        ),
    )  # fmt: skip
    assert {line.split(":")[0] for line in WHOLE.splitlines() if line[:1].isalpha()} == {
        each.name for each in fields(TrainRecipe)
    }


def test_what_is_left_out_has_a_default(recipe, tmp_path) -> None:
    found = read_recipe(recipe(LEAST))
    assert found == TrainRecipe(preset="molora", base="org/model", data=(tmp_path / "d.jsonl",))
    assert (found.stages, found.seeds, found.sampling) == ((), (0,), Sampling())
    assert read_recipe(recipe(LEAST + "out:\nmax_length: null\n")) == found


def test_a_single_stage_stands_at_the_top(recipe) -> None:
    found = read_recipe(recipe(LEAST + "steps: 20\nlearning_rate: 0.5\ntrain: router"))
    assert found.stages == (Stage(name="train", train="router", steps=20, learning_rate=0.5),)
    assert read_recipe(recipe(LEAST + "learning_rate: 0.5")).stages[0].epochs == 1
    assert read_recipe(recipe(LEAST + "steps: 20"), {"epochs": 3}).stages == (Stage(name="train", epochs=3.0),)
    assert read_recipe(recipe(LEAST + "epochs: 3"), {"steps": 9}).stages == (Stage(name="train", steps=9),)
    with pytest.raises(ComposeError, match="stages say for themselves what the keys steps, final say"):
        read_recipe(recipe(WHOLE + "steps: 3\nfinal: 0"))
    stage = {each.name for each in fields(Stage)}
    assert set(SINGLE_STAGE) == stage - {"name", "sampling", "batch_size", "accumulation", "tasks", "experts"}


def test_the_command_line_beats_the_recipe(recipe, tmp_path) -> None:
    given = {
        "preset": "xlora", "out": Path("here"), "bank": [Path("a"), Path("b")], "seeds": (5,), "batch_size": 8,
        "options": {"top_k": 3}, "columns": {"task": "set"}, "sampling": {"by": "sqrt", "temperature": None},
        "max_length": None,
    }  # fmt: skip
    found = read_recipe(recipe(WHOLE), given)
    assert (found.preset, found.out, found.bank, found.seeds) == ("xlora", Path("here"), (Path("a"), Path("b")), (5,))
    assert found.options == {"top_k": 3, "gate": {"init": "normal"}}
    assert found.columns == {"prompt": "question", "response": "answer", "task": "set"}
    assert found.sampling == Sampling(by="sqrt", batch="homogeneous")
    assert (found.batch_size, found.max_length) == (8, 128)
    alone = read_recipe(None, {"preset": "xlora", "base": "m", "data": ["d.jsonl"], "steps": 3})
    assert alone == TrainRecipe(
        preset="xlora", base="m", data=(Path("d.jsonl"),), stages=(Stage(name="train", steps=3),)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mapping of keys to values, got nothing"),
        ("preset: a\npreset: b", "duplicate key 'preset'"),
        ("preset: !!python/name:os.system {}", "tags .* are not allowed"),
        ("preset: x", "base is missing; data is missing"),
        (LEAST + "prest: x", r"unknown key 'prest'; did you mean 'preset'\?"),
        (LEAST + "step: 3", "unknown key 'step'; did you mean 'steps'"),
        (LEAST + "seeds: [a]", "seeds must be a list of integers, or one, got"),
        (LEAST + "seeds: []", "seeds must be a list of integers"),
        (LEAST + "seeds: [1, 1]", "seeds must differ"),
        (LEAST + "bank: 3", "bank must be a list of paths, or one, got 3"),
        (LEAST + "batch_size: 2.5", "batch_size must be an integer, got 2.5"),
        (LEAST + "batch_size: true", "batch_size must be an integer, got True"),
        (LEAST + "batch_size: 6\naccumulation: 4", "batch_size must be a multiple of accumulation"),
        (LEAST + "batch_size: 0", "both at least 1; got 0 and 1"),
        (LEAST + "max_length: 1", "max_length must be at least 2"),
        (LEAST + "precision: float16", "precision must be one of float32, bfloat16, got 'float16'"),
        (LEAST + "truncate: yes", "truncate must be one of refuse, prompt_left, got True"),
        (LEAST + "options: [1]", "options must be a mapping of names to values"),
        (LEAST + "columns: {prompt: 3}", "columns must be a mapping of names to names"),
        (LEAST + "columns: {promt: x}", "unknown field of a record 'promt'; did you mean 'prompt'"),
        (LEAST + "sampling: sqrt", "sampling must be a mapping of by, temperature, batch; got 'sqrt'"),
        (LEAST + "sampling: {by: root}", "sampling.by must be one of proportional, sqrt"),
        (LEAST + "sampling: {by: temperature}", "sampling: temperature goes with by 'temperature'"),
        (LEAST + "stages: [{name: a}]", r"stages\[0\]: needs steps or epochs"),
        (LEAST + "stages: [3]", r"stages\[0\] must be a mapping of name, train"),
        (LEAST + "stages: []", "stages must be a list of mappings"),
        (LEAST + "stages: [{steps: 3}]", r"stages\[0\].name is missing"),
        (LEAST + "stages: [{name: a, steps: 3, lr: 1}]", r"stages\[0\]: unknown key 'lr'"),
        (LEAST + "stages: [{name: a, steps: 3, sampling: {batch: x}}]", r"stages\[0\].sampling.batch must be one of"),
        (LEAST + "stages: [{name: a, steps: 3}, {name: a, steps: 3}]", "a is there more than once"),
    ],
)
def test_bad_recipes_are_refused_with_the_reason(recipe, text, message) -> None:
    with pytest.raises(ComposeError, match=message) as caught:
        read_recipe(recipe(text))
    assert "recipe.yaml" in str(caught.value)


def test_all_problems_are_told_at_once(recipe) -> None:
    text = (
        "preset: xlroa\ndata: d\nseed: 3\nseeds: x\nstages:\n- {name: a, steps: -1, train: all}\n- {name: b, steps: x}"
    )
    with pytest.raises(ComposeError) as caught:
        read_recipe(recipe(text), presets=["xlora", "molora"])
    for problem in (
        "unknown preset 'xlroa'; did you mean 'xlora'",
        "base is missing",
        "unknown key 'seed'; did you mean 'seeds'",
        "seeds must be a list of integers",
        "stages[0].train must be one of",
        "stages[1].steps must be an integer, got 'x'",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize("text", [WHOLE, LEAST, LEAST + "steps: 5\nsampling: {by: sqrt}"])
def test_a_written_recipe_reads_back_as_the_same_run_anywhere(recipe, tmp_path, text) -> None:
    (tmp_path / "model").mkdir()
    found = read_recipe(recipe(text))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.json").write_text(json.dumps(found.to_json()))
    assert read_recipe(elsewhere / "recipe.json") == found


def test_the_recipe_of_the_documentation_is_one(recipe) -> None:
    from compose.routers import recipe as module

    text = (module.__doc__ or "").split("::\n")[1].split("\nA run of")[0]
    found = read_recipe(recipe("\n".join(line[4:] for line in text.splitlines())))
    assert [stage.name for stage in found.stages] == ["router", "joint"]
    assert found.sampling == Sampling(by="sqrt", batch="homogeneous")
