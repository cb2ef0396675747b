"""The one registry of benchmark cases: name, baseline, targets, and points that are gated before they are timed."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from timing import Timing


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        quick: Tiny shapes and one round: shows that a case runs, says nothing about speed.
        full: Also what takes minutes.
        device: A torch device.
        rounds: Rounds of interleaved timing; ``None`` leaves it to the case.
    """

    quick: bool = False
    full: bool = False
    device: str = "cpu"
    rounds: int | None = None


@dataclass(frozen=True)
class Check:
    """One number held against its target.

    Attributes:
        name: What the number is.
        value: The number.
        relation: ``">="`` or ``"<="``, or ``""`` for a number that has no target.
        target: The limit.
        unit: Unit of value and target.
    """

    name: str
    value: float
    relation: Literal[">=", "<=", ""] = ""
    target: float | None = None
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` without one."""
        if not self.relation or self.target is None:
            return None
        return self.value >= self.target if self.relation == ">=" else self.value <= self.target


@dataclass(frozen=True)
class Measured:
    """What one point yields: the numbers, and the timings they come from (seconds, or seconds per unit).

    ``cells``: One record per shape where a point is a mean over many; for the file, not for the terminal.
    """

    checks: list[Check]
    ours: Timing | None = None
    baseline: Timing | None = None
    note: str = ""
    cells: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """One shape of a case.

    Attributes:
        label: Names the shape.
        gate: Raises ``AssertionError`` when ours and the baseline disagree; it runs first.
        measure: Times both; only called on a green gate.
    """

    label: str
    gate: Callable[[], None]
    measure: Callable[[], Measured]


@dataclass(frozen=True)
class Case:
    """A benchmark: ``points(settings)`` yields one point after the other, so only one holds memory at a time."""

    name: str
    description: str
    baseline: str
    targets: str
    points: Callable[[Settings], Iterable[Point]]
    requires: tuple[str, ...] = ()
    devices: tuple[str, ...] = field(default=("cpu",))

    def reason_to_skip(self, settings: Settings) -> str | None:
        """Return why this case cannot run here, or ``None``."""
        kind = settings.device.split(":")[0]
        if kind not in self.devices:
            return f"runs on {' or '.join(self.devices)}, not on {kind}"
        missing = [name for name in self.requires if importlib.util.find_spec(name) is None]
        return f"the baseline needs {', '.join(missing)}, which is not installed" if missing else None


CASES: dict[str, Case] = {}


def case(
    name: str,
    *,
    description: str,
    baseline: str,
    targets: str,
    requires: tuple[str, ...] = ("peft",),
    devices: tuple[str, ...] = ("cpu",),
) -> Callable[[Callable[[Settings], Iterator[Point]]], Callable[[Settings], Iterator[Point]]]:
    """Register the decorated generator of points as a case."""

    def enter(points: Callable[[Settings], Iterator[Point]]) -> Callable[[Settings], Iterator[Point]]:
        if name in CASES:
            raise ValueError(f"two benchmark cases are named {name!r}")
        CASES[name] = Case(name, description, baseline, targets, points, requires, devices)
        return points

    return enter


def load_cases() -> dict[str, Case]:
    """Import every file of ``cases/`` and return the registry, by name."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "cases")]):
        if not module.name.startswith("_"):
            importlib.import_module(f"cases.{module.name}")
    return dict(sorted(CASES.items()))
