"""The registry: scan on first look-up, hints on a miss, errors on a clash, safe under threads."""

import sys
import threading
from pathlib import Path

import pytest

from compose.errors import DuplicateNameError, UnknownNameError
from compose.registry import Registry


def test_a_miss_names_the_nearest_and_all_known() -> None:
    registry: Registry[int] = Registry("merge method", package=None)
    registry.register("ties")(1)
    registry.register("linear")(2)
    with pytest.raises(
        UnknownNameError, match=r"unknown merge method 'tise'; did you mean 'ties'\? \(known: linear, ties\)"
    ):
        registry["tise"]


def test_a_clash_is_an_error() -> None:
    registry: Registry[int] = Registry("thing", package=None)
    registry.register("a")(1)
    with pytest.raises(DuplicateNameError, match="already registered"):
        registry.register("a")(2)
    assert registry["a"] == 1


def test_threads_wait_for_the_first_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "slow_plugins"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from compose.registry import Registry\nTHINGS = Registry('thing', 'slow_plugins')\n"
    )
    (package / "one.py").write_text(
        "import time\ntime.sleep(0.3)\nfrom slow_plugins import THINGS\nTHINGS.register('one')(1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from slow_plugins import THINGS

    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(list(THINGS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["one"]] * 4
    for name in [name for name in sys.modules if name.startswith("slow_plugins")]:
        del sys.modules[name]
