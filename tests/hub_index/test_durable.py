"""Files that appear whole or not at all; the exhaustive runs are in test_durability.py."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from compose.errors import HubIndexError
from compose.hub_index import durable
from compose.hub_index.durable import file_sha256, publish_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    publish_file(path, [b"first"])
    publish_file(path, [b"se", memoryview(b"co"), b"", b"nd"])
    assert path.read_bytes() == b"second"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(durable.os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    publish_file(tmp_path / "x", [b"0123456789"])
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_source_that_breaks_leaves_the_old_file(tmp_path: Path) -> None:
    def chunks():
        yield b"new"
        raise RuntimeError("the source broke")

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the source broke"):
        publish_file(tmp_path / "x", chunks())
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    for size in (0, 1, 2**20, 2**20 + 1):
        data = os.urandom(size)
        (tmp_path / "x").write_bytes(data)
        assert file_sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(HubIndexError, match="more than the limit of 10 bytes"):
        file_sha256(tmp_path / "x", max_bytes=10)
    for wrong in (tmp_path, tmp_path / "missing"):
        with pytest.raises(HubIndexError, match=r"not a regular file|cannot be opened"):
            file_sha256(wrong)
