"""Where an index lies without a path."""

import sys
from pathlib import Path

import pytest

from compose.hub_index.place import default_index


def test_the_variable_comes_first(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPOSE_INDEX", str(tmp_path / "my.db"))
    assert default_index() == tmp_path / "my.db"


@pytest.mark.skipif(sys.platform != "linux", reason="the data folder of Linux")
def test_else_the_data_folder(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMPOSE_INDEX", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_index() == tmp_path / "adapter-compose" / "adapters.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_index() == Path.home() / ".local" / "share" / "adapter-compose" / "adapters.db"
