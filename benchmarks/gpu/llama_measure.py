"""One set of targets on one model: PEFT's logits as the gate, then times of ours and PEFT beside the base model's."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft_side import peft_model
from registry import Check
from timing import Timing

from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.attach import attach
from gpu.graph_timing import captured, eager_time, graph_time
from gpu.llama_model import Size, decode_step, make_adapters, parameter_bytes, prompt_pass, update_bytes

STEPS = {"decode": decode_step, "prompt": prompt_pass}
OVERHEAD, SPEED_UP = 1.10, 10.0
_LIMITS = {torch.bfloat16: 0.25, torch.float32: 1e-3}  # of the change the adapters make; a wrong adapter's is over 1
_GRAPH_CALLS = 2


class RedGateError(AssertionError):
    """Our logits are not PEFT's; says by how much."""


@dataclass(frozen=True)
class Setting:
    """What is measured on.

    Attributes:
        model: The base model; bare between calls.
        size: Of model, bank and batches.
        device: A torch device.
        backend: Ours.
        peft: Whether PEFT runs: it is the gate and the baseline, and takes most of the time.
        bandwidth: Bytes per second a large copy reads and writes; 0 where it was not measured.
    """

    model: Any
    size: Size
    device: str
    backend: str
    peft: bool
    bandwidth: float

    def rows(self, step: str) -> int:
        """Rows of a step's batch."""
        return self.size.adapters if step == "decode" else self.size.prompt[0]

    def tokens(self, step: str) -> int:
        """Tokens of a step's batch."""
        return self.size.adapters if step == "decode" else self.size.prompt[0] * self.size.prompt[1]


@dataclass(frozen=True)
class StepTimes:
    """Graph and eager seconds of one step; ``graph`` is None where it cannot be captured."""

    graph: Timing | None
    eager: Timing


def measured_bandwidth(device: str) -> float:
    """Bytes per second that a copy of a gigabyte reads and writes; 0 without a GPU."""
    if not device.startswith("cuda"):
        return 0.0
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_time([lambda: target.copy_(source)], device).median


def time_step(step: Callable[[], object], device: str) -> StepTimes:
    """Time a step from a graph of a few of them, and eagerly."""
    eager = eager_time([step], device, at_least=0.2)
    return StepTimes(graph_time([step] * _GRAPH_CALLS, device), eager)


def run_targets(
    name: str, targets: Sequence[str], setting: Setting, base: dict[str, StepTimes]
) -> list[dict[str, Any]]:
    """Return one record per step; a red gate, or a model that cannot run, gives records without times."""
    started = time.perf_counter()
    adapters = make_adapters(setting.model, setting.size, targets, setting.device)
    head = {"targets": name, "adapters": len(adapters), "rank": setting.size.rank, "peft": setting.peft}
    try:
        errors, theirs = check_logits(adapters, setting) if setting.peft else ({}, {})
        ours = _ours(adapters, setting)
    except RedGateError as error:
        return [{**head, "step": step, "status": "red", "reason": str(error)} for step in STEPS]
    except Exception as error:  # noqa: BLE001 - recorded, so that the other targets still run
        reason = f"{type(error).__name__}: {error}"
        return [{**head, "step": step, "status": "failed", "reason": reason} for step in STEPS]
    took = {"took_s": round(time.perf_counter() - started, 1)}
    return [
        {**head, "status": "ok", "error": errors.get(step), **took}
        | _record(step, setting, adapters, base[step], ours[step], theirs.get(step))
        for step in STEPS
    ]


def check_logits(adapters: list[Adapter], setting: Setting) -> tuple[dict[str, float], dict[str, Timing]]:
    """Compare our logits, eager and replayed from a graph, with PEFT's.

    Returns the largest difference by step, and PEFT's eager times. A difference is relative to the change that the
    adapters make to the base model's logits.

    Raises:
        RedGateError: A difference is too large, or not a number.
    """
    if importlib.util.find_spec("peft") is None:
        raise RuntimeError("the gate and the baseline need peft, which is not installed; install it or give --no-peft")
    steps = {step: make(setting.model, setting.size, setting.device) for step, make in STEPS.items()}
    bare = {step: run() for step, run in steps.items()}
    bank = Bank.from_adapters(adapters)
    with attach(setting.model, bank, backend=setting.backend) as attached:
        ours = {step: _logits(attached, run, setting, step) for step, run in steps.items()}
    with torch.device(setting.device):
        wrapped = peft_model(setting.model, adapters, device=setting.device)
    errors, times = {}, {}
    try:
        for step, make in STEPS.items():
            names = [adapters[row % len(adapters)].name for row in range(setting.rows(step))]
            run = make(wrapped, setting.size, setting.device)
            theirs = run(adapter_names=names)
            change = (theirs - bare[step]).double().norm()
            errors[step] = max(float((mine - theirs).double().norm() / change) for mine in ours[step])
            if not errors[step] <= _LIMITS[setting.size.dtype]:
                allowed = _LIMITS[setting.size.dtype]
                raise RedGateError(
                    f"{step}: {errors[step]:.2e} of the adapters' change away from PEFT ({allowed:.0e})"
                )
            times[step] = eager_time([lambda run=run, names=names: run(adapter_names=names)], setting.device)
    finally:
        wrapped.unload()
    return errors, times


def _ours(adapters: list[Adapter], setting: Setting) -> dict[str, StepTimes]:
    bank = Bank.from_adapters(adapters)
    times = {}
    with attach(setting.model, bank, backend=setting.backend) as attached:
        for step, make in STEPS.items():
            run = make(setting.model, setting.size, setting.device)
            attached.set([bank.names[row % len(bank)] for row in range(setting.rows(step))])
            times[step] = time_step(run, setting.device)
    return times


def _logits(attached: Any, run: Callable[[], torch.Tensor], setting: Setting, step: str) -> list[torch.Tensor]:
    """Return a step's logits with one adapter after the other over its rows: eager, and replayed from a graph."""
    found: list[torch.Tensor] = []
    names = attached.bank.names
    with attached.using([names[row % len(names)] for row in range(setting.rows(step))]):
        eager = run().clone()
        replay = captured([lambda: found.append(run())], setting.device)
        replay()
    return [eager, found[-1].clone()]


def _record(
    step: str, setting: Setting, adapters: list[Adapter], base: StepTimes, ours: StepTimes, theirs: Timing | None
) -> dict[str, Any]:
    """Return times in milliseconds, ratios with their goals, and what the ratio to the base model could be at best."""
    factors, rows = update_bytes(adapters[: setting.rows(step)], setting.tokens(step))
    goals = setting.device != "cpu"
    checks = []
    for kind in ("graph", "eager"):
        mine, bare = getattr(ours, kind), getattr(base, kind)
        checks.append(Check(f"ours / base, {kind}", mine.median / bare.median, "<=" if goals else "", OVERHEAD, "x"))
        if theirs is not None:
            wanted = ">=" if goals and step == "decode" else ""
            ratio = theirs.median / mine.median
            checks.append(
                Check(f"PEFT eager / ours {kind}", ratio, wanted, SPEED_UP if step == "decode" else None, "x")
            )
    weights = parameter_bytes(setting.model)
    if step == "decode":
        checks.append(Check("floor of ours / base by bytes of factors and weights", 1 + factors / weights, unit="x"))
    if setting.bandwidth:
        moved = (factors + rows) / setting.bandwidth
        checks.append(
            Check(
                "floor of ours / base, graph, if an update only moved its bytes",
                1 + moved / base.graph.median,
                unit="x",
            )
        )
    times = {"base": base.graph, "ours": ours.graph}, {"base": base.eager, "ours": ours.eager, "peft": theirs}
    return {
        "step": step,
        "batch": [setting.rows(step), setting.tokens(step) // setting.rows(step)],
        "context": setting.size.context if step == "decode" else 0,
        "graph_ms": {key: _summary(timing) for key, timing in times[0].items() if timing is not None},
        "eager_ms": {key: _summary(timing) for key, timing in times[1].items() if timing is not None},
        "factor_bytes": factors,
        "row_bytes": rows,
        "weight_bytes": weights,
        "bandwidth": setting.bandwidth,
        "checks": [{"name": c.name, "value": c.value, "target": c.target, "met": c.met} for c in checks],
    }


def _summary(timing: Timing) -> dict[str, float]:
    return {
        "median": round(timing.median * 1e3, 4),
        "best": round(timing.best * 1e3, 4),
        "spread": round(timing.spread, 4),
    }
