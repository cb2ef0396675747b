"""Programs in processes of their own that need not import torch and transformers: a server has, and forks.

For tests that need another process and not another import (seconds each); the fixture is ``warm_python``. A program
runs as ``__main__`` in a fork of the server, which has imported nothing of ours, with its own arguments, environment,
folder and streams, and ends as an interpreter does. All forks of a server have one hash seed, which is not that of
the tests' process. What a program imports, and variables read during imports, are tested in new interpreters.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

STREAMS = ("stdin", "stdout", "stderr")
LIBRARIES = {
    "torch": (),
    "transformers": ("LlamaForCausalLM", "PreTrainedTokenizerFast", "T5ForConditionalGeneration"),
}


class WarmProcess:
    """A running program; like ``subprocess.Popen`` where it has the same names."""

    def __init__(self, server: WarmPython, pid: int, folder: Path) -> None:
        self._server, self.pid, self._folder = server, pid, folder
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; ``None`` while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 300.0) -> int:
        """Exit code, once it has ended; after ``timeout`` seconds it is killed."""
        if self.returncode is None:
            killer = threading.Timer(timeout, os.kill, (self.pid, signal.SIGKILL))
            killer.start()
            self.returncode = self._server.ask(wait=self.pid)
            killer.cancel()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        return (self._folder / "stderr").read_text()


class WarmPython:
    """The client of one server."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._folder = tempfile.TemporaryDirectory(prefix="warm-python-")
        self._started: list[WarmProcess] = []

    def ask(self, **request: Any) -> Any:
        """Send one request and return the answer."""
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server has ended with {self._server.wait()}")
        return json.loads(answer)

    def start(
        self, program: str | Path, *arguments: object, cwd: Path | str = "/", stdin: str = "",
        env: Mapping[str, str] | None = None,
    ) -> WarmProcess:  # fmt: skip
        """Start a program: code, or the path of a file."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        for name in STREAMS:
            (folder / name).write_text(stdin if name == "stdin" else "")
        code, file = (program.read_text(), str(program)) if isinstance(program, Path) else (program, "-c")
        words = [file, *map(str, arguments)]
        environment = dict(os.environ if env is None else env)
        request = {"code": code, "argv": words, "cwd": str(cwd), "env": environment, "streams": str(folder)}
        self._started.append(WarmProcess(self, self.ask(start=request), folder))
        return self._started[-1]

    def run(
        self, program: str | Path, *arguments: object, timeout: float = 300.0, **how: Any
    ) -> subprocess.CompletedProcess:
        """Run a program to its end; see `start`."""
        process = self.start(program, *arguments, **how)
        code = process.wait(timeout)
        return subprocess.CompletedProcess([str(program), *arguments], code, process.stdout, process.stderr)

    def close(self) -> None:
        """End the server, and programs that still run."""
        for process in self._started:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        self._folder.cleanup()


def serve(requests: IO[str], answers: IO[str]) -> dict[str, Any] | None:
    """Answer requests until there are none; in a fork, return at once with what it has to run."""
    for line in requests:
        request = json.loads(line)
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                return request["start"]
        else:
            pid = request.get("wait") or request["poll"]
            ended, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def become(program: dict[str, Any]) -> None:
    """Run the program in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored by what runs in the background
    for number, name in enumerate(STREAMS):
        file = os.open(Path(program["streams"]) / name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(program["env"])
    os.chdir(program["cwd"])
    if "OMP_NUM_THREADS" in os.environ:  # OpenMP has read it
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv[:] = program["argv"]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    exec(compile(program["code"], sys.argv[0], "exec"), main.__dict__)


if __name__ == "__main__":
    protocol = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for library, names in LIBRARIES.items():
        for name in names:
            getattr(importlib.import_module(library), name)
    gc.freeze()
    started = serve(*protocol)
    if started is not None:
        become(started)
