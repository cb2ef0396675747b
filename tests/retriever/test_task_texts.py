import json
import re

import pytest

from compose.errors import ComposeError, ExamplesError, UnknownNameError
from compose.retriever.task_texts import read_task_texts, split_tasks

TEXTS = {name: [f"{name} {n}" for n in range(10)] for name in "abcdefghij"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_both_spellings_are_read_by_task_each_text_once(tmp_path) -> None:
    first = write(
        tmp_path / "1.jsonl", {"task": "sum", "input": "1+1", "output": "2"}, {"adapter": "sum", "prompt": "2+2"}
    )
    second = write(tmp_path / "2.jsonl", {"task": "sort", "input": "b a"}, {"task": "sum", "input": "1+1"})
    assert read_task_texts([first, second]) == {"sum": ["1+1", "2+2"], "sort": ["b a"]}


def test_turns_are_read_and_names_may_be_limited(tmp_path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "1+1"), ("assistant", "2"))]
    path = write(tmp_path / "1.jsonl", {"task": "sum", "messages": turns}, {"task": "sort", "input": "b a"})
    assert read_task_texts([path], known=["sum", "sort"]) == {"sum": ["1+1"], "sort": ["b a"]}
    with pytest.raises(ExamplesError, match=r"1\.jsonl:2: unknown adapter or task 'sort'"):
        read_task_texts([path], known=["sum"])


def test_all_bad_lines_are_told(tmp_path) -> None:
    path = write(
        tmp_path / "1.jsonl",
        {"input": "x"},
        {"task": "a"},
        {"task": "a", "adapter": "b", "input": "x"},
        {"task": 1, "input": "x"},
    )
    with pytest.raises(ExamplesError) as caught:
        read_task_texts([path])
    for number, words in ((1, "'adapter' or 'task'"), (2, "'input' or 'prompt'"), (3, "both"), (4, "string")):
        assert re.search(f"1.jsonl:{number}: .*{words}", str(caught.value))


def test_queries_never_train_and_unseen_tasks_neither() -> None:
    split = split_tasks(TEXTS, unseen=0.3, held_out=0.2, seed=0)
    assert len(split.unseen) == 3
    assert len(split.seen) == 7
    assert not split.unseen.keys() & split.train.keys()
    for name, texts in TEXTS.items():
        queries = {**split.seen, **split.unseen}[name]
        assert len(queries) == 2
        assert sorted([*queries, *split.samples[name]]) == sorted(texts)
    assert all(split.train[name] == split.samples[name] for name in split.train)


def test_a_split_depends_on_the_seed_alone() -> None:
    again = split_tasks(dict(reversed(TEXTS.items())), unseen=0.3, held_out=0.2, seed=0)
    assert again == split_tasks(TEXTS, unseen=0.3, held_out=0.2, seed=0)
    assert again != split_tasks(TEXTS, unseen=0.3, held_out=0.2, seed=1)


def test_unseen_tasks_can_be_named_or_none() -> None:
    assert list(split_tasks(TEXTS, unseen=("c", "h"), held_out=0.5, seed=0).unseen) == ["c", "h"]
    assert split_tasks(TEXTS, unseen=0.0, held_out=0.5, seed=0).unseen == {}
    pair = split_tasks({"a": ["1", "2"], "b": ["1", "2"]}, unseen=0.0, held_out=0.9, seed=0)
    assert [len(texts) for texts in (*pair.samples.values(), *pair.seen.values())] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unseen": 1.0}, ComposeError, "unseen must be a share"),
        ({"held_out": 0.0}, ComposeError, "held_out must lie in"),
        ({"unseen": ("z",)}, UnknownNameError, "unknown task 'z'"),
        ({"unseen": 0.95}, ComposeError, "fewer than two to train on"),
        ({"texts": {"a": ["x"], "b": ["y", "z"]}}, ComposeError, "at least two different inputs, ['a'] have one"),
    ],
)
def test_what_cannot_be_split_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=re.escape(message)):
        split_tasks(**({"texts": TEXTS, "unseen": 0.2, "held_out": 0.2, "seed": 0} | options))
