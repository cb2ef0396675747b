"""Mixed-task records: every accepted schema, every problem with its line, folders of tasks."""

import json
import logging
from pathlib import Path

import pytest

from compose.errors import ComposeError, ExamplesError
from compose.routers.records import MixedExample, mixed_hash, read_mixed, task_names
from compose.text.examples import Example


def write(file: Path, *records: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return file


@pytest.fixture
def file(tmp_path):
    return lambda *records: write(tmp_path / "mixed.jsonl", *records)


def test_the_whole_schema(file) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = file(
        {"task": "t", "prompt": "p", "response": "r", "expert": "e", "group": 1, "cluster": 3, "weight": 0.5},
        "",
        {"task": "t", "prompt": "p", "response": "r", "expert": None, "group": None, "cluster": None, "extra": [1]},
        {"task": "c", "messages": [*turns, {"role": "assistant", "content": "a"}]},
        {"task": "c", "prompt": "p", "response": "yes", "choices": ["yes", "no"]},
    )
    found = read_mixed(path)
    assert found == [
        MixedExample(Example("p", "r"), "t", "e", 1, 3, 0.5),
        MixedExample(Example("p", "r"), "t"),
        MixedExample(Example("u", "a", (), tuple(turns)), "c"),
        MixedExample(Example("p", "yes", ("yes", "no")), "c"),
    ]
    assert [each.place for each in found] == [f"{path}:{line}" for line in (1, 3, 4, 5)]
    assert task_names(found) == ("c", "t")


@pytest.mark.parametrize(
    ("record", "prompt", "response"),
    [
        ({"input": "p", "output": "r"}, "p", "r"),
        ({"prompt": "p", "output": "r"}, "p", "r"),
        ({"instruction": "i", "input": "p", "output": "r", "answer": "x"}, "i\np", "r"),
        ({"instruction": "i", "input": "", "output": "r"}, "i", "r"),
        ({"instruction": "i", "input": None, "answer": "r"}, "i", "r"),
        ({"instruction": "i", "response": "r"}, "i", "r"),
        ({"Q": "p", "A": "r"}, "p", "r"),
        ({"question": "p", "answer": "r"}, "p", "r"),
        ({"source": "p", "target": "r"}, "p", "r"),
        ({"prompt": "p", "response": "r", "source": "web"}, "p", "r"),
    ],
)
def test_known_columns_of_published_data(file, record, prompt, response) -> None:
    assert read_mixed(file({"task": "t", **record})) == [MixedExample(Example(prompt, response), "t")]


def test_other_names_of_labels(file) -> None:
    text = {"prompt": "p", "response": "r"}
    found = read_mixed(
        file(
            {**text, "task_name": "t", "adapter": "e", "cluster_id": 2, "task_type": 1},
            {**text, "task": "t", "task_type": "classification"},
            {**text, "task": "t", "group": 0, "task_type": 1},
        )
    )
    assert [(each.task, each.expert, each.cluster, each.group) for each in found] == [
        ("t", "e", 2, 1), ("t", None, None, None), ("t", None, None, 0),
    ]  # fmt: skip


def test_columns_name_foreign_ones_and_win_over_known_ones(file) -> None:
    record = {"frage": "p", "antwort": "r", "input": "x", "output": "y", "menge": "t", "lora": "e", "w": 2}
    columns = {"prompt": "frage", "response": "antwort", "task": "menge", "expert": "lora", "weight": "w"}
    assert read_mixed(file(record), columns=columns) == [MixedExample(Example("p", "r"), "t", "e", weight=2)]
    half = {"prompt": "frage", "task": "menge"}
    assert read_mixed(file(record), columns=half) == [MixedExample(Example("p", "y"), "t")]
    both = {**columns, "instruction": "input"}
    assert read_mixed(file(record), columns=both)[0].example == Example("x\np", "r")
    chat = {"task": "t", "chat": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    assert read_mixed(file(chat), columns={"messages": "chat"})[0].example.output == "a"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "x"}, "unknown field of a record 'promt'; did you mean 'prompt'"),
        ({"prompt": ""}, "column of 'prompt' must be a name"),
        ({"prompt": 3}, "column of 'prompt' must be a name, got 3"),
        ({"messages": "m", "prompt": "p"}, "leave out the columns of prompt"),
        ({"expert": "lroa"}, "no line has the column 'lroa' for 'expert'"),
        ({"task": "menge"}, "mixed.jsonl:1: has no column 'menge' for 'task'"),
        ({"response": "out"}, "mixed.jsonl:1: has no column 'out' for 'response'"),
    ],
)
def test_columns_that_cannot_be(file, columns, message) -> None:
    with pytest.raises(ComposeError, match=message):
        read_mixed(file({"task": "t", "prompt": "p", "response": "r"}), columns=columns)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("{", "not valid JSON"),
        ({"prompt": "p", "response": "r"}, "has no task"),
        ({"task": 3, "prompt": "p", "response": "r"}, "'task' must be a string"),
        ({"task": "", "prompt": "p", "response": "r"}, "its task is empty"),
        ({"task": "t", "task_name": "u", "prompt": "p", "response": "r"}, "has both 'task' and 'task_name'"),
        ({"task": "t", "prompt": "p"}, "no known pair of columns"),
        ({"task": "t", "prompt": "p", "input": "x", "response": "r"}, "has several pairs of columns"),
        ({"task": "t", "prompt": "p", "response": ""}, "the output is empty"),
        ({"task": "t", "prompt": "p", "response": 3}, "'response' must be a string"),
        ({"task": "t", "instruction": "p"}, "needs exactly one of 'answer'"),
        ({"task": "t", "prompt": "p", "response": "r", "choices": ["x"]}, "contain the output 'r'"),
        ({"task": "t", "messages": []}, "at least two"),
        ({"task": "t", "prompt": "p", "response": "r", "expert": ""}, "its expert is empty"),
        ({"task": "t", "prompt": "p", "response": "r", "expert": 1}, "'expert' must be a string or null"),
        ({"task": "t", "prompt": "p", "response": "r", "group": 2}, "'group' must be 0, 1 or null, got 2"),
        ({"task": "t", "prompt": "p", "response": "r", "group": True}, "'group' must be 0, 1 or null, got True"),
        ({"task": "t", "prompt": "p", "response": "r", "cluster": -1}, "'cluster' must be a whole number"),
        ({"task": "t", "prompt": "p", "response": "r", "cluster": 1.0}, "'cluster' must be a whole number"),
        (
            {"task": "t", "prompt": "p", "response": "r", "weight": -1},
            "'weight' must be a number from 0 to 1e9, got -1",
        ),
        (
            {"task": "t", "prompt": "p", "response": "r", "weight": "1"},
            "'weight' must be a number from 0 to 1e9, got '1'",
        ),
        (
            '{"task": "t", "prompt": "p", "response": "r", "weight": NaN}',
            "'weight' must be a number from 0 to 1e9, got nan",
        ),
        ({"task": "mth", "prompt": "p", "response": "r"}, "unknown task 'mth'; did you mean 'math'"),
        (
            {"task": "t", "prompt": "p", "response": "r", "expert": "lore"},
            "unknown expert 'lore'; did you mean 'lora'",
        ),
    ],
)
def test_a_bad_line_is_named(file, record, problem) -> None:
    path = file({"task": "t", "prompt": "p", "response": "r"}, "", record)
    with pytest.raises(ExamplesError) as error:
        read_mixed(path, tasks=["t", "math", ""], experts=["lora", ""])
    assert str(error.value).startswith(f"{path}:3: ")
    assert problem in str(error.value)


def test_a_folder_holds_a_task_per_file_or_subfolder(tmp_path, caplog) -> None:
    text = {"prompt": "p", "response": "r"}
    write(tmp_path / "math.jsonl", text, {**text, "expert": None}, {**text, "expert": "code"})
    write(tmp_path / "code" / "train.jsonl", {**text, "task": "code"})
    write(tmp_path / "code" / "test.jsonl", text, text)
    write(tmp_path / "cod.jsonl", text)
    write(tmp_path / ".hidden.jsonl", "{")
    with caplog.at_level(logging.WARNING):
        found = read_mixed(tmp_path, experts=["math", "code"])
    assert [(each.task, each.expert) for each in found] == [
        ("cod", None), ("code", "code"), ("math", "math"), ("math", None), ("math", "code"),
    ]  # fmt: skip
    (told,) = caplog.messages
    assert told.startswith("task 'cod' labels no expert: unknown expert 'cod'; did you mean 'code'?")
    assert {each.expert for each in read_mixed(tmp_path)} == {None, "code"}
    assert len(read_mixed(tmp_path, split="test")) == 6


def test_several_paths_and_all_problems_of_them(tmp_path) -> None:
    text = {"prompt": "p", "response": "r"}
    one = write(tmp_path / "one" / "a.jsonl", text, {**text, "task": "b"}, {**text, "weight": -1})
    two = write(tmp_path / "two.jsonl", text, {**text, "task": "b"})
    with pytest.raises(ExamplesError) as error:
        read_mixed([tmp_path / "one", two])
    first, second, third = str(error.value).splitlines()
    assert first == f"{one}:2: its task 'b' is not that of its file, 'a'"
    assert second.startswith(f"{one}:3: 'weight' must be")
    assert third.startswith(f"{two}:1: has no task")


def test_folders_that_hold_no_tasks_or_one_twice(tmp_path) -> None:
    with pytest.raises(ExamplesError, match="no task in this folder"):
        read_mixed(tmp_path)
    with pytest.raises(ExamplesError, match="no such file"):
        read_mixed(tmp_path / "nothing.jsonl")
    text = {"prompt": "p", "response": "r"}
    write(tmp_path / "a.jsonl", text)
    write(tmp_path / "a" / "train.jsonl", text)
    with pytest.raises(ExamplesError, match="a is there as a file and as a folder"):
        read_mixed(tmp_path)


def test_the_hash_sees_labels_and_order_but_no_places() -> None:
    one, two = MixedExample(Example("a", "b"), "t"), MixedExample(Example("a", "b"), "t", cluster=0)
    assert mixed_hash([one]) == mixed_hash([MixedExample(Example("a", "b"), "t", weight=1, place="x:1")])
    assert len({mixed_hash(rows) for rows in ([one], [two], [one, two], [two, one])}) == 4


def test_examples_made_by_hand_are_checked() -> None:
    with pytest.raises(ExamplesError, match=r"its task is empty; 'group' must be .*; 'weight' must be"):
        MixedExample(Example("a", "b"), "", group=5, weight=float("inf"))
