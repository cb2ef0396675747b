"""``compose demo`` and ``compose search --demo``, on the shipped files where they are, else on a tiny stand-in."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli import demo, demo_files
from compose.cli.main import build_app
from compose.demo import assets
from compose.demo.tasks import TASKS
from compose.errors import UnknownNameError


def invoke(*arguments: object):
    return CliRunner().invoke(build_app(), [*map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def stand_in(workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the tiny base and bank instead of the shipped ones, and few examples."""
    monkeypatch.setattr(demo_files, "demo_paths", lambda: (workspace.base, workspace.bank))
    monkeypatch.setattr(demo_files, "TEST_ITEMS", 4)
    monkeypatch.setattr(demo, "TEST_ITEMS", 4)
    monkeypatch.setattr(demo, "TASKS", tuple(demo.Shown(shown.task, 2) for shown in demo.TASKS))


def test_the_shown_tasks_exist_and_are_one_of_each_held_out_group() -> None:
    assert [TASKS[shown.task].group for shown in demo.TASKS] == ["wording", "composition", "mixture"]
    assert set(demo.READING) == {"wording", "composition", "mixture"}


def test_list_names_every_task_with_its_group() -> None:
    result = invoke("search", "--demo", "list")
    assert result.exit_code == 0, result.stderr
    for name, task in TASKS.items():
        assert name in result.stdout
        assert task.group in result.stdout
    listed = json.loads(invoke("search", "--demo", "list", "--json").stdout)["tasks"]
    assert {one["name"] for one in listed} == set(TASKS)
    assert listed[0]["group"] == "wording"


def test_an_unknown_task_gets_a_hint(tmp_path: Path, stand_in: None) -> None:
    name = next(iter(TASKS))
    with pytest.raises(UnknownNameError, match="did you mean"):
        demo_files.demo_task(name + "x")
    result = invoke("search", "--demo", name + "x", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert repr(name) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_shots_and_test_items_share_no_input() -> None:
    task = demo_files.demo_task(demo.TASKS[0].task)
    shots, test = demo_files.demo_examples(task, 5, 0, 50)
    assert (len(shots), len(test)) == (5, 50)
    assert not {example.input for example in shots} & {example.input for example in test}
    other, _ = demo_files.demo_examples(task, 5, 1, 1)
    assert {example.input for example in other} != {example.input for example in shots}


def test_missing_demo_files_say_how_to_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "demo_base", lambda: tmp_path / "none")
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "compose demo build" in result.stderr
    assert demo_files.demo_state()["files"] is False


@pytest.mark.slow
def test_the_demo_writes_runs_and_an_index_and_prints_a_table(tmp_path: Path, stand_in: None) -> None:
    out = tmp_path / "out"
    result = invoke("demo", "--out", out)
    assert result.exit_code == 0, result.output
    names = [shown.task for shown in demo.TASKS]
    assert {path.name for path in out.iterdir()} == {*names, "index.html"}
    index = (out / "index.html").read_text()
    for name in names:
        assert f'href="{name}/report.html"' in index
        assert (out / name / "report.html").is_file()
        assert name in result.stdout
    for reading in demo.READING.values():
        assert reading[:40] in result.stdout
    assert str(out / "index.html") in result.stdout


def test_the_demo_keeps_what_is_there_unless_forced(tmp_path: Path, stand_in: None) -> None:
    (tmp_path / "mine").write_text("x")
    result = invoke("demo", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_building_needs_an_empty_folder_and_a_device_that_is_here(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    result = invoke("demo", "build", "--out", tmp_path)
    assert (result.exit_code, "not empty" in result.stderr) == (2, True)
    result = invoke("demo", "build", "--out", tmp_path / "new", "--device", "warp")
    assert (result.exit_code, "'warp'" in result.stderr) == (2, True)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_search_takes_its_inputs_from_a_demo_task(tmp_path: Path, stand_in: None) -> None:
    options = ["--shots", "2", "--draw", "1", "--budget", "20", "--controls", "none", "--json"]
    result = invoke("search", "--demo", demo.TASKS[0].task, *options, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    expected, _ = demo_files.demo_examples(TASKS[demo.TASKS[0].task], 2, 1, 1)
    assert [item["input"] for item in report["examples"]] == [example.input for example in expected]
    assert report["data"]["test"] == demo_files.TEST_ITEMS
