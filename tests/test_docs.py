"""The README is short and true: its example runs, its commands exist, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS = (
    "compose/engine",
    "compose/evaluation",
    "compose/fewshot",
    "compose/search",
    "compose/formats",
    "compose/demo",
    "compose/cli",
    "compose/merging",
    "compose/report",
    "compose/text",
)
OUTSIDE = (
    "kernels",
    "routers",
    "retriever",
    "kernels/grouped_lora",
    "kernels/mixture_lora",
    "kernels/delta_lines",
    "hub_index",
    "examples",
    "tests",
)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 250


def test_the_example_runs(tmp_path: Path, warm_python) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 12
    done = warm_python.run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows, mixed = done.stdout.splitlines()
    assert rows.startswith("['STONE RIVER LAMP', 'lamp river stone', ")
    assert mixed.startswith("['STONE-RIVER-LAMP'")


def test_every_command_is_named_and_every_named_command_exists() -> None:
    from compose.cli import COMMANDS

    named = set(re.findall(r"^ {4}compose ([a-z]+)", README, re.MULTILINE))
    assert named <= set(COMMANDS)
    assert {name for name in COMMANDS if f"compose {name}" not in README and name != "demo"} == set()


@pytest.mark.parametrize("folder", [*FOLDERS, *OUTSIDE])
def test_every_folder_has_a_readme(folder: str) -> None:
    assert len((ROOT / folder / "README.md").read_text().splitlines()) >= 4


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tables_of_the_readme_are_what_their_command_prints() -> None:
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "demo_study.py"), "--print"]
    rows = str(ROOT / "benchmarks" / "demo_study_h200.jsonl")
    done = subprocess.run([*command, rows], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        assert line.replace("| auto |", "| **auto** |") in README


def test_the_table_of_merge_methods_is_what_its_command_prints() -> None:
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "merge_quality.py"), "--print"]
    rows = str(ROOT / "benchmarks" / "merge_quality.jsonl")
    done = subprocess.run([*command, rows], capture_output=True, text=True, check=True)
    text = (ROOT / "compose" / "merging" / "README.md").read_text()
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) > 40
    assert [line for line in lines if line not in text] == []


def test_the_table_of_the_router_study_is_what_its_command_prints() -> None:
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "router_study.py"), "--print"]
    rows = str(ROOT / "benchmarks" / "router_study_h200.jsonl")
    done = subprocess.run([*command, rows], capture_output=True, text=True, check=True)
    text = (ROOT / "routers" / "README.md").read_text()
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) > 3
    assert [line for line in lines if line not in text] == []
