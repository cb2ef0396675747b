"""Reading examples: every accepted shape, and every problem named with its line."""

from pathlib import Path

import pytest

from compose.errors import ExamplesError
from compose.text.examples import Example, examples_hash, read_examples


def write(folder: Path, *lines: str) -> Path:
    file = folder / "few.jsonl"
    file.write_text("\n".join(lines))
    return file


def test_the_three_shapes(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '{"input": "a", "output": "b", "extra": 1}',
        "",
        '{"prompt": "c", "response": "yes", "choices": ["no", "yes"]}',
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}',
    )
    assert read_examples(file) == [
        Example("a", "b"),
        Example("c", "yes", ("no", "yes")),
        Example("hi", "ho", (), ({"role": "user", "content": "hi"},)),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object, got list"),
        ('{"input": "a"}', "needs exactly one of 'output' or 'response'"),
        ('{"input": "a", "prompt": "b", "output": "c"}', "has both 'input' and 'prompt'"),
        ('{"input": 1, "output": "c"}', "'input' must be a string, got int"),
        ('{"input": "a", "output": ""}', "the output is empty"),
        ('{"input": "a", "output": "c", "choices": ["x"]}', "contain the output 'c'"),
        ('{"input": "a", "output": "c", "choices": ["c", "c"]}', "distinct"),
        ('{"input": "a", "output": "c", "choices": "c"}', "list of strings"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "at least two"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
            "must be the assistant's",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = write(tmp_path, '{"input": "a", "output": "b"}', line)
    with pytest.raises(ExamplesError) as error:
        read_examples(file)
    assert f"{file}:2: " in str(error.value)
    assert problem in str(error.value)


def test_all_bad_lines_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError) as error:
        read_examples(write(tmp_path, *["{"] * 30))
    assert len(str(error.value).splitlines()) == 21
    assert "and 10 more" in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="no such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ExamplesError, match="no examples"):
        read_examples(write(tmp_path, ""))


def test_the_hash_sees_contents_and_order() -> None:
    one, two = Example("a", "b"), Example("c", "d")
    assert examples_hash([one, two]) != examples_hash([two, one])
    assert examples_hash([one]) == examples_hash([Example("a", "b")])
    assert examples_hash([one]) != examples_hash([Example("a", "b", ("b", "c"))])


def test_a_prompt_format_survives_its_file(tmp_path) -> None:
    from compose.text.encoding import PromptFormat

    chosen = PromptFormat("Q: {input}\nA:", "\n")
    chosen.save(tmp_path)
    assert PromptFormat.of_folder(tmp_path) == chosen
    (tmp_path / "other").mkdir()
    PromptFormat().save(tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
