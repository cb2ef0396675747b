"""Child processes that write to an index until they are done, fail or are killed, and say what they finished."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        said: The lines it wrote, complete ones only.
        signal: That killed it, 0 where it ended by itself.
        code: Its exit code.
    """

    said: list[str]
    signal: int
    code: int


class Child:
    """A forked process running ``work(say)``; it must come from a process with one thread and no open index."""

    def __init__(self, work: Callable[[Callable[[str], None]], int]) -> None:
        self._read, write = os.pipe()
        self._data = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            code = 70
            try:
                code = work(lambda line: _say(write, line))
            finally:
                os._exit(code)
        os.close(write)

    def kill_after(self, seconds: float, *, said: int = 0) -> Ended:
        """Let it run until it ``said`` so many lines and ``seconds`` longer, kill it, and return what it had said."""
        while self._data.count(b"\n") < said and (piece := os.read(self._read, 65536)):
            self._data += piece
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        """Return when it has ended."""
        data = self._data
        while piece := os.read(self._read, 65536):
            data += piece
        os.close(self._read)
        _, status = os.waitpid(self.pid, 0)
        whole = data.decode()[: data.rfind(b"\n") + 1]
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return Ended(whole.splitlines(), killed, os.WEXITSTATUS(status) if not killed else -1)


def _say(descriptor: int, line: str) -> None:
    os.write(descriptor, line.encode() + b"\n")
