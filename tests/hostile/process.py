"""A suite in a process of its own, so that a signal or a limit ends that and is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.hostile.figures import Figures

ENTRY = Path(__file__).resolve().parents[2] / "benchmarks" / "hostile.py"
MOST_SECONDS = 3600


def run_suite(suite: str, volume: int, folder: Path, *, seed: int = 0) -> Figures:
    """Run one suite of ``benchmarks/hostile.py`` and return its figures; a signal is one of them.

    Raises:
        AssertionError: The process ended otherwise without figures.
    """
    options = {"--one": suite, "--volume": volume, "--seed": seed, "--folder": folder}
    done = subprocess.run(
        [sys.executable, "-P", str(ENTRY), *(str(word) for option in options.items() for word in option)],
        input="y\n" * 100,  # a yes to whatever is asked
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=MOST_SECONDS,
        check=False,
    )
    if done.returncode < 0:
        return Figures(suite, signals=1, other=[f"the process was ended by signal {-done.returncode}"])
    assert done.returncode == 0, done.stderr[-2000:]
    return Figures(**json.loads(done.stdout.splitlines()[-1]))
