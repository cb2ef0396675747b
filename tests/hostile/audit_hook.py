"""An audit hook that sees code run, and twelve pickles that run some: what canaries are made of, and its own test."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import runpy
import socket
import subprocess
import sys
import timeit
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.handmade_pickles import MARK, Gadget, legacy_pickle

EVENTS = (
    "exec", "compile", "code.__new__", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
    "os.startfile", "pty.spawn", "subprocess.Popen", "socket.", "ctypes.dlopen", "ctypes.dlsym", "urllib.Request",
    "webbrowser.open", "ftplib.", "smtplib.", "http.client", "marshal.load", "os.putenv", "os.remove", "os.chmod",
)  # fmt: skip
PYTHON = f"open({MARK!r}, 'w').write('ran')"
MODULE = f"import os\nos.system('echo ran > {MARK}')\n{PYTHON}\n"

GADGETS: dict[str, Callable[[], Gadget]] = {
    "os.system": lambda: Gadget(os.system, f"echo ran > {MARK}"),
    "subprocess.Popen": lambda: Gadget(subprocess.Popen, ["true"]),
    "eval": lambda: Gadget(eval, PYTHON),
    "exec": lambda: Gadget(exec, PYTHON),
    "compile": lambda: Gadget(compile, PYTHON, "gadget", "exec"),
    "__import__": lambda: Gadget(__import__, "pyclbr"),
    "runpy.run_path": lambda: Gadget(runpy.run_path, "gadget.py"),
    "socket.socket": lambda: Gadget(socket.create_connection, ("127.0.0.1", 9), 0.1),
    "pickle.loads": lambda: Gadget(pickle.loads, legacy_pickle(Gadget(eval, PYTHON))),
    "timeit.timeit": lambda: Gadget(timeit.timeit, PYTHON, "pass", timeit.default_timer, 1),
    "os.posix_spawn": lambda: Gadget(os.posix_spawn, "/bin/true", ["true"], {}),
    "ctypes.CDLL": lambda: Gadget(ctypes.CDLL, "libc.so.6"),
}
"""12 pickles that call a function when they are loaded."""


class Ears:
    """An audit hook that counts the events of `EVENTS` while it listens."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()
        self._listening = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._listening and event.startswith(EVENTS):
            self.heard[f"{event} {_what(event, arguments)}"[:200]] += 1

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Count from nothing."""
        self.heard = Counter()
        self._listening = True
        try:
            yield
        finally:
            self._listening = False


def _what(event: str, arguments: tuple[Any, ...]) -> str:
    if event == "exec" and hasattr(arguments[0], "co_filename"):
        return f"{arguments[0].co_filename}:{arguments[0].co_name}"
    return " ".join(str(one)[:80] for one in arguments)


def heard() -> dict[str, dict[str, int]]:
    """Return what the hook hears of every gadget that is loaded without any care: the hook's own test."""
    ears, found = Ears(), {}
    Path("gadget.py").write_text(MODULE)
    for name, make in GADGETS.items():
        data = legacy_pickle(make())
        with ears.listening(), contextlib.suppress(OSError):  # nobody listens at the socket
            pickle.loads(data)
        found[name] = dict(ears.heard)
    return found
