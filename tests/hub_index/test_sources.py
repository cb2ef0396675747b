"""Where adapters lie and what they are called."""

from pathlib import Path

import pytest

from compose.errors import AdapterFormatError, HubIndexError
from compose.hub_index import sources
from compose.hub_index.refusals import AdapterRejectedError, code_of
from compose.hub_index.sources import Candidate, names_of, reader, snapshot_of, walk

COMMIT = "ab" * 20


def candidate(*parts: str, repo_id: str = "") -> Candidate:
    return Candidate(Path("/x", *parts), Path("/x"), parts, repo_id, COMMIT if repo_id else "")


def test_a_snapshot_is_taken_apart() -> None:
    found = snapshot_of(Path(f"/c/models--org--my-name/snapshots/{COMMIT}/deep/er"))
    assert found == (Path("/c/models--org--my-name"), "org/my-name", COMMIT)
    assert snapshot_of(Path(f"/c/other/snapshots/{COMMIT}")) is None
    assert snapshot_of(Path("/c/models--org--name/snapshots/main")) is None  # a branch is no commit
    assert snapshot_of(Path(f"/c/models--org--name/blobs/{COMMIT}")) is None


def test_names_are_those_of_folders_unless_two_share_one() -> None:
    assert names_of([candidate("a", "z"), candidate("b", "y"), candidate()]) == ["z", "y", "x"]
    assert names_of([candidate("a", "x"), candidate()]) == ["a.x", "x"]
    assert names_of([candidate("a", "x"), candidate("b", "x")]) == ["a.x", "b.x"]
    assert names_of([candidate("_a b", "..x")]) == ["x"]
    assert names_of([candidate("日本")]) == [""]
    assert len(names_of([candidate("y" * 200)])[0]) == 96


def test_a_repository_names_its_snapshot() -> None:
    whole = candidate("models--org--sums", COMMIT, repo_id="org/sums")
    part = candidate("models--org--sums", COMMIT, "words", repo_id="org/sums")
    other = candidate("models--two--sums", COMMIT, repo_id="two/sums")
    assert names_of([whole, part]) == ["sums", "words"]
    assert names_of([whole, other]) == ["org.sums", "two.sums"]


def test_files_are_read_below_the_root_only(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"abc")
    (tmp_path / "out").write_bytes(b"secret")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "near").symlink_to("a")
    read = reader(tmp_path / "in", 3)
    assert (read(tmp_path / "in" / "a"), read(tmp_path / "in" / "near")) == (b"abc", b"abc")
    for path in ("in/link", "in/../out"):
        with pytest.raises(AdapterRejectedError, match="leads out of") as caught:
            read(tmp_path / path)
        assert code_of(caught.value) == "link"
    (tmp_path / "in" / "a").write_bytes(b"abcd")
    with pytest.raises(AdapterFormatError, match="more than the limit of 3"):
        read(tmp_path / "in" / "a")


def test_models_are_no_adapters_and_loops_end(tmp_path: Path) -> None:
    model = tmp_path / "tree" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree", target_is_directory=True)
    assert walk(tmp_path / "tree") == ([], {})


def test_endless_trees_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "MAX_DEPTH", 3)
    (tmp_path / "a" / "b" / "c" / "d").mkdir(parents=True)
    with pytest.raises(HubIndexError, match="add its parts one by one"):
        walk(tmp_path)
