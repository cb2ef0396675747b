"""``compose retrieve`` and ``compose generate --retrieve``: names for texts, and texts by what was retrieved."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli.main import build_app

TEXTS = {
    "one": ["sort a b c", "sort c a", "sort b a d", "sort d c b a", "sort e f"],
    "two": ["zip x y z", "zip z z", "zip y x", "zip x x y", "zip w w w"],
}


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(build_app(), list(map(str, arguments)), input=stdin, env={"COLUMNS": "200"})


def found(*arguments: object, **more) -> dict:
    result = run(*arguments, "--json", **more)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    rows = [{"input": text, "output": "x", "adapter": name} for name, texts in TEXTS.items() for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def folder(workspace, strong, labelled, tmp_path_factory) -> Path:
    """A saved retriever over hidden states of the tiny base."""
    path = tmp_path_factory.mktemp("retriever") / "saved"
    fit = ("--bank", strong, "--examples", labelled, "--encoder", "hidden-states", "--method", "mean")
    result = run("retrieve", *fit, "--base", workspace.base, "--save", path)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    return path


def names(answer: dict) -> list[list[str]]:
    return [[adapter["name"] for adapter in result["adapters"]] for result in answer["results"]]


def test_a_saved_retriever_names_adapters_best_first(workspace, folder) -> None:
    answer = found("retrieve", "sort a c", "zip z y", "--retriever", folder, "--base", workspace.base)
    assert names(answer) == [["one", "two"], ["two", "one"]]
    assert [result["text"] for result in answer["results"]] == ["sort a c", "zip z y"]
    scores = [adapter["score"] for adapter in answer["results"][0]["adapters"]]
    assert 1 >= scores[0] > scores[1]
    assert answer["encoder"]["id"].endswith("base:layer=-1:pooling=mean")
    assert (answer["method"], answer["known"]) == ("mean", 2)


def test_fitting_and_a_saved_folder_give_the_same(workspace, strong, labelled, folder) -> None:
    fit = ("--bank", strong, "--examples", labelled, "--encoder", "hidden-states", "--method", "mean")
    fitted = found("retrieve", "-", *fit, "--base", workspace.base, stdin="sort a c\n\nzip z y\n")
    assert fitted == found("retrieve", "sort a c", "zip z y", "--retriever", folder, "--base", workspace.base)


def test_top_exclude_and_task(workspace, folder) -> None:
    source = ("--retriever", folder, "--base", workspace.base)
    assert names(found("retrieve", "sort a c", "zip z y", *source, "--top", 1)) == [["one"], ["two"]]
    assert names(found("retrieve", "sort a c", "zip z y", *source, "--exclude", "one")) == [["two"], ["two"]]
    task = found("retrieve", "sort a c", "sort c b", "zip z y", *source, "--task")
    assert names(task) == [["one", "two"]]
    assert task["results"][0]["text"] == ["sort a c", "sort c b", "zip z y"]


def test_a_table_for_people(workspace, folder) -> None:
    result = run("retrieve", "sort a c", "zip " + 50 * "z", "--retriever", folder, "--base", workspace.base)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == ["text", "rank", "adapter", "score"]
    assert [line[-2] for line in lines[2:]] == ["one", "two", "two", "one"]
    assert "zip zzzzzzzz" in result.stdout
    assert "..." in result.stdout
    none = run(
        "retrieve", "a", "--retriever", folder, "--base", workspace.base, "--exclude", "one", "--exclude", "two"
    )
    assert "(none)" in none.stdout


def test_adapters_without_examples_are_told(workspace, labelled, tmp_path) -> None:
    fit = ("--encoder", "hidden-states", "--base", workspace.base, "--method", "mean")
    known = run("retrieve", "a", *fit, "--bank", workspace.bank, "--examples", labelled)
    assert known.exit_code == 2
    assert "unknown adapter or task 'one'" in known.stderr
    lines = labelled.read_text().replace('"one"', '"alpha"').replace('"two"', '"gamma"')
    (tmp_path / "some.jsonl").write_text(lines)
    result = run("retrieve", "sort a c", *fit, "--bank", workspace.bank, "--examples", tmp_path / "some.jsonl")
    assert result.exit_code == 0
    assert "never retrieved: beta" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no texts"),
        ([" "], "a text is empty"),
        (["a"], "missing --retriever"),
        (["a", "--retriever", "/nowhere"], "no retriever.json in /nowhere"),
        (["a", "--retriever", "R", "--demo"], "leave out --demo"),
        (["a", "--retriever", "R", "--examples", "E"], "leave out --examples"),
        (["a", "--retriever", "R", "--bank", "B"], "leave out --bank"),
        (["a", "--demo", "--bank", "B"], "leave out --bank"),
        (["a", "--retriever", "FOLDER"], "give --base MODEL"),
        (["a", "--examples", "LABELLED", "--encoder", "hidden-states"], "give --base MODEL"),
        (["a", "--examples", "LABELLED", "--save", "/"], "--save: / exists"),
        (["a", "--retriever", "FOLDER", "--base", "BASE", "--exclude", "three"], "three"),
        (["a", "--retriever", "FOLDER", "--base", "BASE", "--task", "--exclude", "one"], "leave out --task"),
    ],
)
def test_bad_calls_are_refused(workspace, folder, labelled, arguments, words) -> None:
    known = {"FOLDER": folder, "LABELLED": labelled, "BASE": workspace.base}
    result = run("retrieve", *(known.get(word, word) for word in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def generate(workspace, strong, *arguments: object, **more) -> dict:
    options = ("--base", workspace.base, "--bank", strong, "--max-new-tokens", 6)
    return found("generate", *options, *arguments, **more)


def texts(answer: dict) -> list[str]:
    return [output["text"] for output in answer["outputs"]]


def test_generate_gives_every_prompt_what_is_retrieved_for_it(workspace, strong, folder) -> None:
    prompts = ("--prompt", "sort a c", "--prompt", "zip z y")
    answer = generate(workspace, strong, *prompts, "--retrieve", "selection", "--retriever", folder)
    assert answer["retrieve"] == "selection"
    assert [output["adapters"] for output in answer["outputs"]] == [{"one": 1.0}, {"two": 1.0}]
    alone = [
        texts(generate(workspace, strong, "--prompt", prompt, "--adapter", name))[0]
        for prompt, name in (("sort a c", "one"), ("zip z y", "two"))
    ]
    assert texts(answer) == alone
    small = generate(workspace, strong, *prompts, "--retrieve", "selection", "--retriever", folder, "--batch-size", 1)
    assert small == answer


def test_generate_mixes_as_many_as_are_asked_for(workspace, strong, folder) -> None:
    prompt, source = ("--prompt", "sort a c"), ("--retriever", folder)
    mixed = generate(workspace, strong, *prompt, "--retrieve", "mixture", *source, "--top", 2)
    assert mixed["outputs"][0]["adapters"] == {"one": 0.5, "two": 0.5}
    half = generate(workspace, strong, *prompt, "--weights", '{"one": 0.5, "two": 0.5}')
    assert texts(mixed) == texts(half)
    similar = generate(workspace, strong, *prompt, "--retrieve", "fusion", *source, "--temperature", 0.01)
    first, second = similar["outputs"][0]["adapters"].values()
    assert first > second > 0
    assert first + second == pytest.approx(1)
    nothing = generate(workspace, strong, *prompt, "--retrieve", "fusion", *source, "--threshold", 2)
    assert nothing["outputs"][0]["adapters"] == {}
    assert texts(nothing) == texts(generate(workspace, strong, *prompt))


def test_what_every_prompt_got_is_told_beside_the_text(workspace, strong, folder) -> None:
    options = ("--base", workspace.base, "--bank", strong, "--max-new-tokens", 6, "--retriever", folder)
    result = run("generate", *options, "--retrieve", "selection", "sort a c", "zip z y")
    assert result.exit_code == 0
    assert [line for line in result.stderr.splitlines() if line.startswith("[")] == ["[one 1.00]", "[two 1.00]"]
    assert "[one" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retrieve", "average", "--retriever", "FOLDER"], "unknown mode 'average'"),
        (["--retrieve", "mixture"], "needs --retriever FOLDER"),
        (["--retriever", "FOLDER"], "--retriever goes with --retrieve MODE"),
        (["--top", 2], "--top goes with --retrieve"),
        (["--temperature", 1], "--temperature goes with --retrieve"),
        (["--threshold", 1], "--threshold goes with --retrieve"),
        (["--retrieve", "mixture", "--retriever", "FOLDER", "--adapter", "one"], "leave out --adapter"),
        (["--retrieve", "mixture", "--retriever", "FOLDER", "--weights", "{}"], "leave out --weights"),
        (["--retrieve", "mixture", "--retriever", "FOLDER", "--temperature", 0], "temperature must be"),
    ],
)
def test_bad_retrieval_is_refused(workspace, strong, folder, arguments, words) -> None:
    options = ("generate", "--base", workspace.base, "--bank", strong, "--prompt", "a")
    result = run(*options, *(folder if word == "FOLDER" else word for word in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


def test_a_retriever_of_another_bank_or_base_is_refused(workspace, strong, folder, tmp_path) -> None:
    options = ("generate", "--base", workspace.base, "--prompt", "a", "--retrieve", "mixture", "--retriever", folder)
    result = run(*options, "--bank", workspace.bank)
    assert result.exit_code == 2
    assert "lacks 'one', 'two'" in result.stderr
    assert run(*options).exit_code == 2
    assert "--retrieve needs --bank DIR" in run(*options).stderr


@pytest.mark.slow
def test_the_demo_retrieves_by_minilm(tmp_path) -> None:
    """A retriever fitted on the demo's tasks, saved, and used for generation."""
    text = "Sort the words: queen pear apple"
    answer = found("retrieve", text, "--demo", "--top", 3, "--save", tmp_path / "saved")
    assert names(answer)[0][0] == "sort_words"
    assert answer["known"] == 36
    options = ("generate", "--demo", "--retrieve", "selection", "--retriever", tmp_path / "saved")
    assert texts(found(*options, "--prompt", text)) == ["apple pear queen"]
