"""Time per call on the GPU (replays of a CUDA graph of many calls) and on the host (eager calls, wall clock)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

import torch
from timing import Timing

Call = Callable[[], object]


def graph_time(calls: Sequence[Call], device: str, *, replays: int = 20) -> Timing:
    """Return seconds per call of a graph of ``calls``, one sample per replay, by CUDA events.

    A graph that takes long is replayed less often, at least 5 times, so that slow baselines cost about a second.
    Every call runs once outside the graph first, so that nothing is compiled, tuned or allocated while it is captured.
    Without a GPU the calls are run once and the clock of the host says nothing about a kernel.
    """
    if not device.startswith("cuda"):
        return Timing((_host_seconds(calls, 1, device),))
    replay = captured(calls, device)
    for _ in range(3):
        replay()
    replays = max(min(5, replays), min(replays, int(1.0 / _host_seconds([replay], 1, device))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return Timing(tuple(start.elapsed_time(end) * 1e-3 / len(calls) for start, end in events))


def captured(calls: Sequence[Call], device: str) -> Call:
    """Return a function that replays ``calls``, captured once each in order; on a CPU, one that runs them."""
    if not device.startswith("cuda"):
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def eager_time(calls: Sequence[Call], device: str, *, rounds: int = 3, at_least: float = 0.02) -> Timing:
    """Return seconds per call of eager calls back to back, by the host's clock, the device awaited at the end."""
    if not device.startswith("cuda"):
        return Timing((_host_seconds(calls, 1, device),))
    once = _host_seconds(calls, 1, device)
    repeats = max(1, int(at_least / max(once * len(calls), 1e-6)))
    gc.collect()
    gc.disable()
    try:
        return Timing(tuple(_host_seconds(calls, repeats, device) for _ in range(rounds)))
    finally:
        gc.enable()


def cycled(calls: Sequence[Call], count: int) -> list[Call]:
    """Return at least ``count`` calls, whole rounds through ``calls``."""
    return list(calls) * max(1, -(-count // len(calls)))


def _host_seconds(calls: Sequence[Call], repeats: int, device: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / (repeats * len(calls))
