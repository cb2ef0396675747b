"""The README of the retriever: its example runs, its tables are what their command prints, every method is named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compose.retriever.embeddings import ADAPTER_EMBEDDINGS
from compose.retriever.vectors import VECTOR_BACKENDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "retriever" / "README.md").read_text()


def test_every_method_and_backend_is_named() -> None:
    assert [name for name in [*ADAPTER_EMBEDDINGS, *VECTOR_BACKENDS] if f"`{name}`" not in README] == []


def test_the_example_says_what_it_gives(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Retriever.fit" in block)
    names: dict = {}
    exec(code, names)
    retriever, strict = names["retriever"], names["strict"]
    assert retriever.top(["any snow next week"], k=2).names == (("weather", "banking"),)
    assert retriever.top_for_task(["pay rent", "send cash"], k=1).names == (("banking",),)
    assert strict.top(["who painted this"]).rejected.tolist() == [True]
    assert names["again"].top(["rain"], 1).names == strict.top(["rain"], 1).names


@pytest.mark.parametrize(("name", "least"), [("retrieval_recall", 40), ("retriever_training", 8)])
def test_the_tables_are_what_their_commands_print(name: str, least: int) -> None:
    rows = ROOT / "benchmarks" / f"{name}.jsonl"
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / f"{name}.py"), "--print", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) >= least
    assert [line for line in lines if line not in README] == []


def test_real_text_that_is_absent_is_told(tmp_path) -> None:
    for name in ("retrieval_recall", "retriever_training"):
        command = [sys.executable, "-P", str(ROOT / "benchmarks" / f"{name}.py"), "--data", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.startswith("skipped: ")
        assert "clinc150 and banking77" in done.stdout
        assert list(tmp_path.iterdir()) == []
