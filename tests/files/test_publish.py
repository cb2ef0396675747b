"""A folder appears whole or not at all, whatever fails."""

import os

import pytest

from compose.errors import DuplicateNameError
from compose.files import publish
from compose.files.publish import publish_folder

FILES = {"one": b"1" * 1000, "two": b"2"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_and_its_parents_are_made(tmp_path):
    assert content(publish_folder(FILES, tmp_path / "a" / "b")) == FILES
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_existing_folder_is_kept_unless_asked(tmp_path):
    folder = publish_folder(FILES, tmp_path / "x")
    (folder / "extra").write_bytes(b"")
    with pytest.raises(DuplicateNameError, match="exists; choose another folder"):
        publish_folder({"one": b"new"}, folder)
    assert content(folder).keys() == {"one", "two", "extra"}
    publish_folder({"one": b"new"}, folder, overwrite=True)
    assert content(folder) == {"one": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "x").mkdir()
    assert content(publish_folder(FILES, tmp_path / "x")) == FILES


STEPS = [
    (step, at) for step, calls in (("mkdir", 2), ("write", 2), ("fsync", 4), ("rename", 2)) for at in range(calls)
]


@pytest.fixture
def fail(monkeypatch, tmp_path):
    """Return a function that makes the n-th call of one step fail with a full disk."""

    def arm(step, at):
        owner, name = {"write": (publish, "_write_durably"), "fsync": (os, "fsync")}.get(step, (type(tmp_path), step))
        original, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(step)
            if len(calls) == at + 1:
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    return arm


@pytest.mark.parametrize(("step", "at"), STEPS)
def test_a_failure_at_any_step_leaves_the_old_folder(tmp_path, fail, step, at):
    folder = publish_folder({"old": b"old"}, tmp_path / "x")
    fail(step, at)
    with pytest.raises(OSError, match="No space left"):
        publish_folder(FILES, folder, overwrite=True)
    assert content(folder) == {"old": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(("step", "at"), [pair for pair in STEPS if pair != ("rename", 1)])
def test_a_failure_at_any_step_leaves_no_new_folder(tmp_path, fail, step, at):
    fail(step, at)
    with pytest.raises(OSError, match="No space left"):
        publish_folder(FILES, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_files_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, type(tmp_path).rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(type(tmp_path), "rename", lambda self, to: (order.append("rename"), rename(self, to))[1])
    publish_folder(FILES, tmp_path / "x")
    assert order == ["fsync", "fsync", "fsync", "rename", "fsync"]
