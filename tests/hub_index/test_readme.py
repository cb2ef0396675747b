"""The folder's README is true: its example runs, its files exist, its table is of the tests there are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "hub_index" / "README.md").read_text()


def test_the_example_prints_what_it_says(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    said = [line.partition("  # ")[2] for line in code.splitlines() if "  # " in line]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == said


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 10
    assert [link for link in links if not (ROOT / "hub_index" / link).exists()] == []


def test_the_table_has_a_row_for_every_durability_test() -> None:
    source = (ROOT / "benchmarks" / "hub" / "durability.py").read_text()
    names = re.findall(r"Test\(\"([^\"]+)\"", source)
    assert len(names) == 10
    for name in names:
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
        assert "FAILED" not in row
        assert set(re.findall(r"\d+", row.split("|")[3])) <= {"0"}
