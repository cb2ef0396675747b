"""One case of the table, from the correctness gate to the record of times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from registry import Check
from timing import Timing

from gpu import baselines, gate, ours, training, yardsticks
from gpu.cases import REFERENCE_SOURCE, Case
from gpu.graph_timing import Call, captured, cycled, eager_time, graph_time
from gpu.operands import Operands, cold_copies, make_operands, padded

_GRAPH_NODES = 6000


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: A torch device.
        dtype: Of inputs, factors and gates.
        backend: Ours.
        replays: Of every graph.
        quick: Ours, the yardsticks and the stacked baseline only.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    backend: str = "triton"
    replays: int = 20
    quick: bool = False

    @property
    def l2_bytes(self) -> int:
        """Size of the cache that copies have to exceed twice; next to nothing without a GPU."""
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.device.startswith("cuda") else 1

    def calls(self, bytes_read: int) -> int:
        """How many calls a graph holds at least, so that its own launch hardly counts."""
        if self.device == "cpu":
            return 2
        return 64 if bytes_read < 64 << 20 else 16


@dataclass
class Times:
    """Graph and eager times by column, and why a column has none."""

    graph: dict[str, Timing] = field(default_factory=dict)
    eager: dict[str, Timing] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Gate a case, time it and return its record; a red gate, or an op that cannot run, gives one without times."""
    measure = _training if case.training else _forward
    try:
        return measure(case, settings)
    except gate.RedGateError as error:
        return {**_head(case), "status": "red", "reason": str(error)}
    except Exception as error:  # noqa: BLE001 - recorded, so that the other cases still run
        return {**_head(case), "status": "failed", "reason": f"{type(error).__name__}: {error}"}


def _forward(case: Case, settings: Settings) -> dict[str, Any]:
    first = make_operands(case, settings.device, settings.dtype)
    error = check_forward(first, settings)
    copies = cold_copies(first, settings.l2_bytes)
    count = settings.calls(first.bytes_read)
    calls = cycled([ours.in_place(one, settings.backend) for one in copies], count)
    times = Times()
    _yardsticks(times, first, len(copies), len(calls), settings)
    saved = first.base_TD.clone()
    _timed(times, "ours", calls, settings)
    makers = {"ours_plan": lambda: cycled(ours.planned(copies, settings.backend), count)}
    for baseline in baselines.BASELINES:
        if baseline.refuses(case) is None and not (settings.quick and baseline.name != "stacked"):
            makers[baseline.name] = partial(_baseline_calls, baseline, case, copies, count)
    for name, make in makers.items():
        for one in copies:
            one.base_TD.copy_(saved)
        _optional(times, name, make, settings, first)
    if "padded" in case.ratios:
        first.base_TD.copy_(saved)
        _padded(times, first, settings)
    return _record(case, settings, times, error, first, len(copies))


def _baseline_calls(baseline: baselines.Baseline, case: Case, copies: list[Operands], count: int) -> list[Call]:
    """Return a round through the copies, or so much of it that a graph of it stays small."""
    limit = max(2, _GRAPH_NODES // baseline.launches(case))
    return cycled([baseline.make(one) for one in copies[:limit]], min(limit, count))


def check_forward(operands: Operands, settings: Settings) -> float:
    """Compare ours with float64: new memory, in place, and in place from a graph; return the largest error.

    Raises:
        RedGateError: A result differs, or is not written where it was asked for.
    """
    wanted, limit = gate.expected(operands), gate.FORWARD_LIMITS[settings.dtype]
    with gate.poisoned_memory(), torch.no_grad():
        fresh = ours.output(operands.x_TD, operands.stack, operands.gates, operands, settings.backend)
        error = gate.require_close("ours, new memory", fresh, wanted, limit)
        call = ours.in_place(operands, settings.backend)
        error = max(error, gate.check_call("ours, in place", operands, wanted, [call], limit))
    saved = operands.base_TD.clone()
    replay = captured([call], settings.device)
    operands.base_TD.copy_(saved)
    return max(error, gate.check_call("ours, from a graph", operands, wanted, [replay, replay], limit))


def _training(case: Case, settings: Settings) -> dict[str, Any]:
    first = make_operands(case, settings.device, settings.dtype)
    dy_TD = training.output_gradient(first)
    wanted = training.flat(training.expected(first, dy_TD))
    limit = gate.BACKWARD_LIMITS[settings.dtype]
    with gate.poisoned_memory():
        found = training.flat(training.ours(first, dy_TD, settings.backend)())
    error = max(gate.require_close(f"ours, gradient of {name}", found[name], wanted[name], limit) for name in wanted)
    del found
    copies = cold_copies(first, settings.l2_bytes)
    times = Times()
    _timed(times, "ours", cycled([training.ours(one, dy_TD, settings.backend) for one in copies], 4), settings)
    for name, make in training.BASELINES.items():
        refused = next(one for one in baselines.BASELINES if one.name == name).refuses(case)
        if refused is None and not (settings.quick and name not in case.ratios):

            def calls(make: Callable[..., Any] = make, name: str = name) -> list[Call]:
                theirs = training.flat(make(first, dy_TD)())
                for which, gradient in theirs.items():
                    gate.require_close(f"{name}, gradient of {which}", gradient, wanted[which], 3 * limit)
                return cycled([make(one, dy_TD) for one in copies], 4)

            _optional(times, name, calls, settings, None)
    return _record(case, settings, times, error, first, len(copies))


def _yardsticks(times: Times, first: Operands, copies: int, count: int, settings: Settings) -> None:
    """Time an empty kernel, and the best of a few shapes of one that moves the bytes of the case."""
    device, moved = settings.device, (first.bytes_read, first.bytes_written)
    null = yardsticks.null_call(device)
    times.graph["null"] = graph_time([null] * count, device, replays=settings.replays)
    shapes = yardsticks.STREAM_SHAPES[:1] if settings.device == "cpu" else yardsticks.STREAM_SHAPES
    found = [
        graph_time(
            cycled(yardsticks.stream_calls(*moved, copies, device, shape), count), device, replays=settings.replays
        )
        for shape in shapes
    ]
    times.graph["stream"] = min(found, key=lambda timing: timing.median)


def _padded(times: Times, first: Operands, settings: Settings) -> None:
    """Ours on a stack whose adapters are padded to the largest rank, and the stream yardstick of that."""
    wide = padded(first)
    check_forward(wide, settings)
    copies = cold_copies(wide, settings.l2_bytes)
    calls = cycled([ours.in_place(one, settings.backend) for one in copies], settings.calls(wide.bytes_read))
    own = Times()
    _yardsticks(own, wide, len(copies), len(calls), settings)
    times.graph["padded_stream"] = own.graph["stream"]
    _timed(times, "padded", calls, settings)


def _timed(times: Times, name: str, calls: list[Call], settings: Settings) -> None:
    times.graph[name] = graph_time(calls, settings.device, replays=settings.replays)
    times.eager[name] = eager_time(calls, settings.device)


def _optional(
    times: Times, name: str, make: Callable[[], list[Call]], settings: Settings, checked: Operands | None
) -> None:
    """Time what may be unable to run; the reason is kept. The first call is checked where ``checked`` is given."""
    try:
        calls = make()
        if checked is not None:
            limit = 3 * gate.FORWARD_LIMITS[settings.dtype]
            gate.check_call(name, checked, gate.expected(checked), calls[:1], limit)
        _timed(times, name, calls, settings)
    except Exception as error:  # noqa: BLE001 - recorded; ours and the other columns still stand
        times.missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        times.graph.pop(name, None)


def _head(case: Case) -> dict[str, Any]:
    ranks = sorted(set(case.ranks))
    return {
        "case": case.name, "tokens": case.tokens, "adapters": case.adapters, "ranks": ranks, "routing": case.routing,
        "top": case.top, "width": case.width, "training": case.training,
    }  # fmt: skip


def _record(
    case: Case, settings: Settings, times: Times, error: float, first: Operands, copies: int
) -> dict[str, Any]:
    """Return what is printed and written: microseconds, goals, and the reference figures beside them."""
    checks, goals = [], settings.device != "cpu"
    ours_us = {name: times.graph[name].median * 1e6 for name in ("ours", "ours_plan") if name in times.graph}
    for name, value in ours_us.items():
        if case.goal_us is not None:
            checks.append(Check(name, value, "<=" if goals else "", case.goal_us, "us"))
    for name, wanted in case.ratios.items():
        if name in times.graph:
            ratio = times.graph[name].median * 1e6 / ours_us["ours"]
            checks.append(Check(f"{name} / ours", ratio, ">=" if goals else "", wanted, "x"))
    if "padded_stream" in times.graph:
        floor = times.graph["padded_stream"].median / times.graph["stream"].median
        checks.append(Check("padded / ours if both only streamed", floor, unit="x"))
    return {
        **_head(case),
        "status": "ok",
        "smoke": settings.device == "cpu",
        "error": error,
        "copies": copies,
        "bytes_read": first.bytes_read,
        "bytes_written": first.bytes_written,
        "graph_us": {name: _summary(timing) for name, timing in times.graph.items()},
        "eager_us": {name: _summary(timing) for name, timing in times.eager.items()},
        "missing": times.missing,
        "checks": [{"name": c.name, "value": c.value, "target": c.target, "met": c.met} for c in checks],
        "reference_us": dict(case.reference),
        "reference_source": REFERENCE_SOURCE if case.reference else "",
    }


def _summary(timing: Timing) -> dict[str, float]:
    return {
        "median": round(timing.median * 1e6, 3),
        "best": round(timing.best * 1e6, 3),
        "spread": round(timing.spread, 4),
    }
