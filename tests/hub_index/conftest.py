"""The program with an index of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


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
