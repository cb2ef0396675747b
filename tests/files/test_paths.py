"""Paths that cannot be lead to nothing instead of an OSError."""

import pytest

from compose.errors import ComposeError
from compose.files.paths import exists, is_file, is_folder, is_link
from compose.formats import discover
from compose.text.jsonl import read_jsonl
from compose.text.yaml_file import read_yaml


@pytest.fixture(params=["a" * 5000, "a/" * 3000, "a\0b", "\ud800"], ids=["name", "path", "NUL", "surrogate"])
def impossible(request, tmp_path):
    return tmp_path / request.param


@pytest.mark.parametrize("ask", [exists, is_file, is_folder, is_link])
def test_nothing_is_at_a_path_that_cannot_be(ask, impossible):
    assert not ask(impossible)


def test_readers_say_that_there_is_no_such_file(impossible):
    for read in (discover, read_yaml, lambda path: read_jsonl([path], lambda record, line: record)):
        with pytest.raises(ComposeError, match="no such"):
            read(impossible)


def test_what_is_there_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loose").symlink_to("nowhere")
    assert [exists(tmp_path / name) for name in ("file", "link", "loose")] == [True, True, False]
    assert [is_file(tmp_path / name) for name in ("file", "link", "loose")] == [True, True, False]
    assert [is_link(tmp_path / name) for name in ("file", "link", "loose")] == [False, True, True]
    assert is_folder(tmp_path)
    assert not is_folder(tmp_path / "file")
