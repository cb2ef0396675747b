"""What a suite measured: outcomes, time and memory of its cases."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compose.errors import ComposeError

HANG_SECONDS = 60.0


@dataclass
class Figures:
    """Counts of outcomes and the worst case of each measure.

    Attributes:
        suite: Its name.
        cases: How many ran.
        accepted: Loaded, and what was loaded is right.
        refused: Refused by a `ComposeError`.
        other: Everything else: another exception, or a loaded value that is wrong; case and message.
        signals: Processes that a signal ended.
        cpu_s: CPU seconds of the slowest case.
        wall_s: Wall seconds of the slowest case.
        extra_bytes: Memory above the beginning: of the case that took most, or of the whole run where ``whole`` is
            used.
        slowest: Name of the slowest case.
    """

    suite: str
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    other: list[str] = field(default_factory=list)
    signals: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    extra_bytes: int = 0
    slowest: str = ""

    def case(self, name: str, run: Callable[[], object], *, memory: bool = False) -> BaseException | None:
        """Run one case and count its outcome; return the refusal, None when it was accepted.

        Args:
            name: Of the case.
            run: Raises a `ComposeError` where it refuses.
            memory: Whether to measure the memory of this case.
        """
        before = reset_peak() if memory else 0
        cpu, wall = time.process_time(), time.perf_counter()
        caught: BaseException | None = None
        try:
            with time_limit(HANG_SECONDS):
                run()
            self.accepted += 1
        except ComposeError as error:
            self.refused += 1
            caught = error
        except Exception as error:  # noqa: BLE001 - counting these is what the suite is for
            self.other.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            caught = error
        seconds = time.process_time() - cpu
        self.wall_s = max(self.wall_s, time.perf_counter() - wall)
        if seconds > self.cpu_s:
            self.cpu_s, self.slowest = seconds, name
        if memory:
            self.extra_bytes = max(self.extra_bytes, peak() - before)
        self.cases += 1
        return caught

    def add(self, other: Figures) -> None:
        """Count another's cases too."""
        self.cases += other.cases
        self.accepted += other.accepted
        self.refused += other.refused
        self.other += other.other
        self.signals += other.signals
        self.wall_s = max(self.wall_s, other.wall_s)
        self.extra_bytes = max(self.extra_bytes, other.extra_bytes)
        if other.cpu_s > self.cpu_s:
            self.cpu_s, self.slowest = other.cpu_s, other.slowest

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them."""
        return asdict(self)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Measure the memory of everything inside, above what the process had."""
        before = reset_peak()
        yield
        self.extra_bytes = peak() - before


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in what hangs, in the main thread; system calls that block are interrupted."""

    def expire(number: int, frame: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reset_peak() -> int:
    """Begin to measure: return the resident bytes now, and make them the peak where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the largest resident bytes since `reset_peak` (or of the process, where there is no such counter)."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field_name: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field_name + ":")), 0)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, size and time of change of everything below ``folder``, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
