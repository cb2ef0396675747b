"""A folder in memory, where the machine has one: suites write a file per case."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmpfs(tmp_path):
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="compose-hostile-", dir=MEMORY))
    yield folder
    shutil.rmtree(folder)
