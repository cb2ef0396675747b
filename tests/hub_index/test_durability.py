"""The durability tests of spec/ecosystem.md 3.5 at their full volume, in processes without torch.

``python benchmarks/hub/durability.py`` prints the same counts as a table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "hub" / "durability.py"


def counts_of(test: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, "-P", str(SCRIPT), "--only", test, "--json", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["bad"] == [], found
    return found["counts"]


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    counts = counts_of("kill", tmp_path)
    assert counts["rounds"] == 200
    assert counts["acknowledged"] >= 200
    assert (counts["lost"], counts["half"], counts["torn_batches"], counts["corrupt"]) == (0, 0, 0, 0)


def test_eight_writers_and_four_readers(tmp_path: Path) -> None:
    counts = counts_of("writers", tmp_path)
    assert counts["acknowledged"] == counts["found"] == 8 * 500
    assert counts["reads"] > 100
    assert (counts["failed_writers"], counts["failed_readers"], counts["half"], counts["vanished"]) == (0, 0, 0, 0)


def test_a_limit_on_file_sizes_at_50_random_places(tmp_path: Path) -> None:
    counts = counts_of("full", tmp_path)
    assert counts["limits"] == 50
    assert 20 <= counts["failed"] <= 50
    assert (counts["lost"], counts["half"], counts["corrupt"], counts["reruns_incomplete"]) == (0, 0, 0, 0)


def test_a_full_disk(tmp_path: Path) -> None:
    counts = counts_of("tmpfs", tmp_path)
    assert counts["failed"] == 1
    assert (counts["lost"], counts["half"], counts["corrupt"], counts["reruns_incomplete"]) == (0, 0, 0, 0)


def test_a_full_disk_under_export_lock_and_vectors(tmp_path: Path) -> None:
    counts = counts_of("files", tmp_path)
    assert counts["failed"] >= 20
    assert counts["old_intact"] + counts["new_whole"] == counts["limits"] == 51
    assert (counts["partial"], counts["leftovers"], counts["reruns_incomplete"]) == (0, 0, 0)


def test_every_system_call_fails_once_or_is_the_last(tmp_path: Path) -> None:
    counts = counts_of("calls", tmp_path)
    assert counts["points"] >= 150
    assert counts["old_intact"] + counts["new_whole"] == counts["points"]
    assert (counts["partial"], counts["leftovers"], counts["unordered"]) == (0, 0, 0)


def test_an_add_is_cut_off_at_every_step(tmp_path: Path) -> None:
    counts = counts_of("cut", tmp_path)
    assert counts["points"] == counts["interrupted"] + 1
    assert counts["points"] >= 100
    assert (counts["half"], counts["corrupt"], counts["unusable"]) == (0, 0, 0)


def test_every_page_of_an_add_fails_once(tmp_path: Path) -> None:
    counts = counts_of("pages", tmp_path)
    assert counts["points"] == counts["failed"] + 1
    assert counts["points"] >= 10
    assert (counts["lost"], counts["half"], counts["corrupt"]) == (0, 0, 0)


def test_a_migration_is_killed_at_20_points(tmp_path: Path) -> None:
    counts = counts_of("migration", tmp_path)
    assert counts["points"] == counts["killed"] == 20
    assert counts["old"] + counts["new"] == 20
    assert min(counts["old"], counts["new"]) >= 1
    assert (counts["unusable"], counts["half"], counts["corrupt"], counts["newer_accepted"]) == (0, 0, 0, 0)


def test_one_byte_of_one_of_34_adapters(tmp_path: Path) -> None:
    counts = counts_of("locks", tmp_path)
    assert counts["changes"] == counts["refused"] == counts["named"] == 34
    assert (counts["others_named"], counts["unchanged_refused"]) == (0, 0)
