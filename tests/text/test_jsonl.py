"""Reading JSONL: the problems of all files at once, limits over all files, records that JSON allows and we do not."""

from pathlib import Path

import pytest
import torch

from compose.errors import ExamplesError, unknown_name
from compose.text.encoding import pad
from compose.text.examples import read_examples
from compose.text.jsonl import BadLineError, read_jsonl


def write(folder: Path, name: str, *lines: str) -> Path:
    (folder / name).write_text("\n".join(lines))
    return folder / name


def number(record, line) -> tuple[str, int]:
    if record["n"] < 0:
        raise BadLineError("n is negative")
    return line.file.name, record["n"]


def test_lines_come_file_by_file_and_blank_ones_are_skipped(tmp_path) -> None:
    files = [write(tmp_path, "b", '{"n": 1}', "", "  ", '{"n": 2}'), write(tmp_path, "a", '{"n": 3}')]
    assert read_jsonl(files, number) == [("b", 1), ("b", 2), ("a", 3)]


def test_problems_of_all_files_are_told_at_once(tmp_path) -> None:
    files = [write(tmp_path, "a", "", '{"n": -1}', "{"), write(tmp_path, "b", ""), write(tmp_path, "c", '{"n": -1}')]
    with pytest.raises(ExamplesError) as error:
        read_jsonl(files, number)
    first, second, third, fourth = str(error.value).splitlines()
    assert first == f"{files[0]}:2: n is negative"
    assert second.startswith(f"{files[0]}:3: not valid JSON")
    assert third.startswith(f"{files[1]}: no examples")
    assert fourth == f"{files[2]}:1: n is negative"


def test_the_size_limit_is_over_all_files(tmp_path) -> None:
    files = [write(tmp_path, "a", '{"n": 1}'), write(tmp_path, "b", '{"n": 1}')]
    assert len(read_jsonl(files[:1], number, max_bytes=15)) == 1
    with pytest.raises(ExamplesError, match="and 1 more files: 16 bytes, at most 15"):
        read_jsonl(files, number, max_bytes=15)


def test_a_lone_surrogate_and_an_endless_number_are_bad_lines(tmp_path) -> None:
    lines = [r'{"input": "a\ud800", "output": "b"}', '{"input": "a", "output": "b", "x": %s}' % ("9" * 5000)]
    turns = r'{"messages": [{"role": "user", "content": "\udc00"}, {"role": "assistant", "content": "b"}]}'
    with pytest.raises(ExamplesError) as error:
        read_examples(write(tmp_path, "a", *lines, turns))
    first, second, third = str(error.value).splitlines()
    assert "'input' is not valid Unicode (surrogates not allowed at character 1)" in first
    assert "not valid JSON" in second
    assert "'messages' is not valid Unicode" in third


def test_an_unknown_name_gets_a_suggestion_and_a_long_list_is_cut() -> None:
    assert (
        unknown_name("task", "mth", ["math", "code"]) == "unknown task 'mth'; did you mean 'math'? (known: math, code)"
    )
    assert unknown_name("task", "zz", []) == "unknown task 'zz'; (known: none)"
    assert unknown_name("task", "zz", [f"t{n}" for n in range(1000)]).endswith("t39, and 960 more)")


def test_padding_to_a_multiple() -> None:
    ids, mask = pad([[1, 2, 3], [4]], fill=0, multiple=4)
    assert torch.equal(ids, torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]]))
    assert torch.equal(mask, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    assert pad([[1, 2, 3, 4]], fill=0, multiple=4)[0].shape == (1, 4)
