"""Time of calls on a GPU: replays of a CUDA graph that holds a round of them, each over memory of its own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_REPLAYS = 15
_CALLS = 32  # of a graph at least, so that its own launch hardly counts


def graph_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time per call of a graph of ``calls``, which run once before so that all is compiled.

    Raises:
        RuntimeError: The current stream is being captured into a graph already.
    """
    refuse_capture()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    calls = list(calls) * -(-_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(_REPLAYS)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3 / len(calls)


def refuse_capture() -> None:
    """Raise where a CUDA graph is being captured: trial runs would end up in it.

    Raises:
        RuntimeError: It is.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "block sizes cannot be tuned while a CUDA graph is captured; call compose.kernels.tune.tune() before"
        )
