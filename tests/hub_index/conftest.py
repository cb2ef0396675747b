"""An empty index, adapters by number (the ones the benchmarks use), and the program with an index of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from compose.hub_index.records import AdapterRecord
from compose.hub_index.store import Index

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def numbered() -> ModuleType:
    """The module that makes records from their number: ``make_record``, ``same``, ``vector``."""
    spec = importlib.util.spec_from_file_location("numbered_records", BENCHMARKS / "hub" / "records.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_record(numbered: ModuleType) -> Callable[..., AdapterRecord]:
    return numbered.make_record


@pytest.fixture
def index(tmp_path: Path):
    """An empty index."""
    with Index.open(tmp_path / "hub.db", create=True) as opened:
        yield opened


@pytest.fixture
def call_index(tmp_path: Path):
    """Run ``compose index ...`` in its own process, away from the checkout."""

    def run(*arguments: str, **environment: str):
        return subprocess.run(
            [sys.executable, "-P", "-c", "from compose.cli.main import main; main()", "index", *arguments],
            cwd="/",
            env={**os.environ, "OMP_NUM_THREADS": "1", "COMPOSE_INDEX": str(tmp_path / "cli.db"), **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
