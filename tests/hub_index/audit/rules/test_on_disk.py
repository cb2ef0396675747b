"""What lies in the folder: links, special files, missing files, pointers, pickles, code."""

import os
import time
from pathlib import Path

import pytest

from compose.hub_index.audit.evidence import Evidence

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 83900000\n"


def test_a_good_folder_has_no_finding(make, rules) -> None:
    assert rules(make()) == set()


def test_a_link_out_of_the_folder_is_refused_and_not_followed(make, rules, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"peft_type": "SECRET"}')
    folder = make()
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(secret)
    assert "files.link" in rules(folder)
    assert Evidence(folder, "one").config is None


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_nothing_is_opened_behind_a_link_out_of_the_folder(
    make, rules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    outside, opened = tmp_path / f"outside-{name}", []
    real = os.open
    folder = make()
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)

    def watch(path, *arguments, **named):
        opened.append(os.path.realpath(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", watch)
    assert "files.link" in rules(folder)
    assert "nothing is read" in str(Evidence(folder, "one").strict)
    assert str(outside) not in opened
    assert opened  # the other files were read


def test_links_inside_the_folder_are_fine(make, rules) -> None:
    folder = make()
    (folder / "real.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("real.safetensors")
    assert rules(folder) == set()


def test_links_of_a_snapshot_into_its_own_blobs_are_fine_and_others_are_not(make, rules, tmp_path: Path) -> None:
    source = make("source")
    root = tmp_path / "hub" / "models--owner--name"
    snapshot = root / "snapshots" / ("0" * 40)
    blobs = root / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for at, name in enumerate(("adapter_config.json", "adapter_model.safetensors", "README.md")):
        (blobs / str(at)).write_bytes((source / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{at}")
    assert rules(snapshot) == set()
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to(source / "README.md")
    assert "files.link" in rules(snapshot)


def test_a_fifo_is_refused_at_once(make, rules) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    started = time.monotonic()
    assert "files.special" in rules(folder)
    assert time.monotonic() - started < 5


def test_a_fifo_as_card_is_not_opened(make, rules) -> None:
    folder = make()
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    assert "files.special" in rules(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files_are_named(make, findings, name: str) -> None:
    folder = make()
    (folder / name).unlink()
    (found,) = findings(folder, "files.missing")
    assert name in found.detail


def test_a_folder_in_place_of_the_weights(make, findings) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    assert "a folder" in findings(folder, "files.missing")[0].detail


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_pointers_are_told_with_what_to_run(make, findings, rules, name: str) -> None:
    folder = make()
    (folder / name).write_bytes(POINTER)
    (found,) = findings(folder, "files.pointer")
    assert "git lfs pull" in found.detail
    assert not any(rule.startswith("header.") for rule in rules(folder))


def test_pickles_alone_are_refused_and_beside_weights_told(make, rules) -> None:
    folder = make()
    (folder / "adapter_model.bin").write_bytes(b"x")
    found = rules(folder)
    assert "files.pickle-beside" in found
    assert "files.pickle" not in found
    (folder / "adapter_model.safetensors").unlink()
    found = rules(folder)
    assert "files.pickle" in found
    assert "files.missing" not in found


def test_code_is_told(make, rules) -> None:
    folder = make()
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    assert rules(folder) == {"files.code"}


def test_a_weight_file_beyond_the_limit_is_not_read(make, findings, rules) -> None:
    folder = make()
    os.truncate(folder / "adapter_model.safetensors", 3 * 1024**3)  # sparse
    assert "3,221,225,472" in findings(folder, "files.size")[0].detail
    assert "values.finite" not in rules(folder)
