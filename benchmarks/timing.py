"""Timing two things against each other on a machine that others use too.

On the CPU the clock is the process's CPU time with one thread, so waiting for other processes is not counted; on a GPU
it is wall time between synchronisations. The two are run in turn, round by round, and the ratio is taken between the
fastest rounds: disturbances only ever add time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, divided by ``per``."""

    samples: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest round."""
        return min(self.samples)

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Slowest minus fastest round, relative to the median."""
        return (max(self.samples) - self.best) / self.median

    def per(self, count: float) -> Timing:
        """Return the timing of one of ``count`` equal parts."""
        return Timing(tuple(sample / count for sample in self.samples))


def seconds(function: Callable[[], object], device: str, *, repeats: int = 1) -> float:
    """Seconds of one call: CPU time on the CPU, synchronised wall time elsewhere."""
    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        function()
    if cuda:
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def interleaved(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    device: str = "cpu",
    rounds: int = 7,
    at_least: float = 0.02,
) -> tuple[Timing, Timing]:
    """Time both in turn; each round repeats a function until it takes about ``at_least`` seconds.

    The order inside a round alternates and one untimed round goes first.
    """
    functions = (ours, baseline)
    repeats = []
    for function in functions:
        function()
        repeats.append(max(1, int(at_least / max(seconds(function, device), 1e-6))))
    samples: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for index in (0, 1) if number % 2 == 0 else (1, 0):
                samples[index].append(seconds(functions[index], device, repeats=repeats[index]))
    finally:
        gc.enable()
    return Timing(tuple(samples[0])), Timing(tuple(samples[1]))
