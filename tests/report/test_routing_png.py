"""The picture of a router: a PNG without a display, and a clear word where Matplotlib is missing."""

import struct
import sys

import pytest
import torch

from compose.errors import BackendUnavailableError
from compose.report.routing_data import course_of
from compose.report.routing_png import routing_png
from compose.routers.metrics import RoutingMeter
from compose.routers.routing import Decisions
from compose.routers.trace import RoutingTrace


def measured(experts: int, tasks: tuple[str, ...]) -> RoutingTrace:
    meter = RoutingMeter([f"$x_{index}" for index in range(experts)], tasks)
    for task in range(max(1, len(tasks))):
        for layer in range(2):
            probs = torch.randn(5, experts, generator=torch.Generator().manual_seed(task)).softmax(-1)
            gates = probs * (probs > probs.mean() * (0.5 + layer))
            ones, number = torch.ones(5, dtype=torch.bool), torch.full((5,), task)
            here = torch.ones(experts, dtype=torch.bool)
            meter.update(
                [Decisions(f"l.{layer}.q", layer, probs, probs, gates, ones, ones, number, number.clamp_max(0), here)]
            )
    return meter.trace()


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_the_picture_grows_with_what_there_is_to_show() -> None:
    pytest.importorskip("matplotlib")
    trace = measured(3, ("$a_1$ {x}", "<b>\x1b"))
    lines = [{"step": step, "loss": 1.0, "entropy": 1.0, "load": [0.3, 0.3, 0.4]} for step in (0, 10)]
    plain = size(routing_png(trace))
    assert size(routing_png(trace, course_of(lines, trace.experts)))[1] > plain[1]
    assert size(routing_png(measured(3, tuple(f"t{index}" for index in range(10)))))[0] > plain[0]


def test_nothing_measured_is_still_a_picture() -> None:
    pytest.importorskip("matplotlib")
    assert size(routing_png(RoutingTrace(experts=("a", "b"))))[0] > 100


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'adapter-compose\[plots\]'"):
        routing_png(RoutingTrace(experts=("a",)))
