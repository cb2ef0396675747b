"""compose.lock: holds as long as every byte does, and says whose byte it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from compose.errors import HubIndexError
from compose.hub_index.lockfile import check_lock, lock_adapter, read_lock, write_lock
from compose.hub_index.records import AdapterRecord
from compose.hub_index.store import Index

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def bank(index, tmp_path: Path) -> Index:
    """Three adapters with files, one of them without a configuration."""
    for name in ("one", "two", "three"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / WEIGHTS).write_bytes(f"weights of {name}".encode())
        (folder / "README.md").write_text("a card")
        config = f'{{"name": "{name}"}}'.encode() if name != "three" else b""
        if config:
            (folder / CONFIG).write_bytes(config)
        index.add(
            AdapterRecord(
                name=name, sha256_weights=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(), path=name,
                sha256_config=hashlib.sha256(config).hexdigest() if config else "", revision=f"commit {name}",
                base_id="base", base_fingerprint="b" * 64,
            )
        )  # fmt: skip
    return index


@pytest.fixture
def lock(bank: Index, tmp_path: Path) -> Path:
    path = tmp_path / "compose.lock"
    adapters = [bank.get(name) for name in ("two", "one", "three")]
    write_lock(path, [lock_adapter(adapter, bank.folder_of(adapter)) for adapter in adapters])
    return path


def test_a_lock_holds_and_comes_back_in_order(lock: Path, bank: Index, tmp_path: Path) -> None:
    checked = check_lock(lock, bank)
    assert list(checked.lock.adapters) == ["two", "one", "three"]
    assert checked.folders == {name: tmp_path / name for name in ("two", "one", "three")}
    assert checked.notes == ()
    pinned = checked.lock.adapters["one"]
    assert (pinned.weights_file, pinned.config_file, pinned.revision) == (WEIGHTS, CONFIG, "commit one")
    assert checked.lock.adapters["three"].config_file == ""
    assert {"adapter-compose", "python", "torch"} <= checked.lock.versions.keys()
    assert read_lock(lock) == checked.lock


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("name", ["one", "two"])
def test_one_changed_byte_is_refused_by_name(lock: Path, bank: Index, tmp_path: Path, name: str, file: str) -> None:
    data = bytearray((tmp_path / name / file).read_bytes())
    data[3] ^= 1
    (tmp_path / name / file).write_bytes(data)
    with pytest.raises(HubIndexError, match=rf"1 of 3 adapters .* adapter '{name}': .*{file}: the .* has sha256"):
        check_lock(lock, bank)


def test_every_changed_adapter_is_named(lock: Path, bank: Index, tmp_path: Path) -> None:
    (tmp_path / "one" / WEIGHTS).write_bytes(b"longer than it was before")
    (tmp_path / "three" / WEIGHTS).unlink()
    with pytest.raises(HubIndexError, match=r"2 of 3 .*adapter 'one': .*adapter 'three': .*cannot be opened"):
        check_lock(lock, bank)


def test_another_file_of_the_folder_may_change(lock: Path, bank: Index, tmp_path: Path) -> None:
    (tmp_path / "one" / "README.md").write_text("another card")
    check_lock(lock, bank)


def test_folders_can_be_given_without_an_index(lock: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("one", "two", "three")}
    assert check_lock(lock, folders=folders).folders == folders
    with pytest.raises(HubIndexError, match="adapter 'two': nobody said where it is"):
        check_lock(lock, folders={name: folder for name, folder in folders.items() if name != "two"})


@pytest.mark.parametrize(
    ("field", "value"), [("revision", "another"), ("base_fingerprint", "c" * 64), ("sha256_weights", "d" * 64)]
)
def test_an_index_that_says_otherwise_is_refused(lock: Path, bank: Index, field: str, value: str) -> None:
    from dataclasses import replace

    bank.add(replace(bank.get("one"), **{field: value}), replace=True)
    with pytest.raises(HubIndexError, match=f"adapter 'one': {field.removesuffix('_weights')} '"):
        check_lock(lock, bank)


def test_an_adapter_that_left_the_index_is_named(lock: Path, bank: Index) -> None:
    bank.remove(["two"])
    with pytest.raises(HubIndexError, match="adapter 'two': not in"):
        check_lock(lock, bank)


def test_what_changed_since_it_was_indexed_is_not_pinned(bank: Index, tmp_path: Path) -> None:
    (tmp_path / "one" / CONFIG).write_bytes(b"{}")
    with pytest.raises(HubIndexError, match=r"adapter 'one': no file in .* has the configuration of its record"):
        lock_adapter(bank.get("one"), tmp_path / "one")
    with pytest.raises(HubIndexError, match="known by description alone"):
        lock_adapter(AdapterRecord(name="a", source="description"), tmp_path)


def test_other_versions_are_told_not_refused(lock: Path, bank: Index) -> None:
    whole = json.loads(lock.read_text())
    whole["versions"] |= {"torch": "0.1", "gone": "9"}
    lock.write_text(json.dumps(whole))
    notes = check_lock(lock, bank).notes
    assert "gone was 9, is missing" in notes
    assert any(note.startswith("torch was 0.1, is ") for note in notes)


def test_a_fifo_in_place_of_the_weights_does_not_hang(lock: Path, bank: Index, tmp_path: Path) -> None:
    import os

    (tmp_path / "one" / WEIGHTS).unlink()
    os.mkfifo(tmp_path / "one" / WEIGHTS)
    with pytest.raises(HubIndexError, match=r"adapter 'one': .*not a regular file"):
        check_lock(lock, bank)


def broken(change) -> object:
    def apply(whole: dict) -> bytes:
        change(whole)
        return json.dumps(whole).encode()

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: b"", "not a lock"),
        (lambda whole: b"[]", "not a lock"),
        (lambda whole: b"\xff", "not a lock"),
        (broken(lambda whole: whole.pop("adapters")), "not a lock"),
        (broken(lambda whole: whole.update(schema=2)), "lock schema 2 is newer than 1"),
        (broken(lambda whole: whole["adapters"][0].update(more=1)), "not a lock"),
        (broken(lambda whole: whole["adapters"][0].update(name="../up")), "adapter name must be"),
        (
            broken(lambda whole: whole["adapters"][0].update(weights_file="../../etc/passwd")),
            "is not the name of a file",
        ),
        (broken(lambda whole: whole["adapters"][0].update(weights_file=3)), "weights_file must be text"),
        (broken(lambda whole: whole["adapters"][0].update(sha256_weights="")), "sha256_weights must be 64"),
        (broken(lambda whole: whole["adapters"].append(whole["adapters"][0])), "an adapter is in it twice"),
    ],
)
def test_what_is_no_lock_is_refused(lock: Path, change, message: str) -> None:
    lock.write_bytes(change(json.loads(lock.read_text())))
    with pytest.raises(HubIndexError, match=message):
        read_lock(lock)


def test_a_lock_needs_distinct_adapters(lock: Path, tmp_path: Path) -> None:
    pinned = read_lock(lock).adapters["one"]
    for adapters in ([], [pinned, pinned]):
        with pytest.raises(HubIndexError, match="a lock needs adapters with distinct names"):
            write_lock(tmp_path / "other.lock", adapters)
    with pytest.raises(HubIndexError, match="no such lock"):
        read_lock(tmp_path / "other.lock")
