"""What a training run will do, as plain values, from one timed micro-batch."""

from __future__ import annotations

import time
from typing import Any

import torch

from compose.routers.training import Run


def plan_of(run: Run) -> dict[str, Any]:
    """Return trained parameters, sites, steps, records per task, predicted tokens, and minutes at most.

    The model runs forward and backward on the first micro-batch, twice; the second is timed. No weight changes.
    """
    routed, data = run.routed, run.data
    spec = routed.spec
    stages = []
    for number, of_stage in enumerate(run.stage_data):
        steps = run.plan.steps[number]
        stages.append(
            {
                "name": of_stage.stage.name,
                "trains": spec.train if of_stage.stage.train == "preset" else of_stage.stage.train,
                "steps": steps,
                "learning_rate": of_stage.stage.learning_rate,
                "schedule": of_stage.stage.schedule,
                "tasks": of_stage.sampler.counts(0, steps),
                "batch_size": of_stage.sampler.batch_size,
                "accumulation": of_stage.sampler.accumulation,
            }
        )
    lengths = [len(row.prompt) + len(row.response) for row in data.rows]
    seconds = _seconds_per_step(run)
    return {
        "preset": spec.preset,
        "departures": list(spec.departures),
        "site": spec.site,
        "scope": spec.scope,
        "sites": len(routed.router.layout),
        "targets": len(routed.router.site_of),
        "experts": list(routed.router.experts),
        "trained_parameters": trained(run),
        "base_parameters": sum(p.numel() for name, p in routed.named_parameters() if _base(name)),
        "records": len(data.rows),
        "tasks": list(data.tasks),
        "longest_tokens": max(lengths),
        "predicted_tokens": sum(len(row.response) for row in data.rows),
        "truncated_records": sum(row.cut > 0 for row in data.rows),
        "steps": run.plan.total,
        "stages": stages,
        "seconds_per_step": round(seconds, 4),
        "minutes": round(seconds * run.plan.total / 60, 2),
    }


def trained(run: Run) -> dict[str, int]:
    """Numbers of parameters of the router and of the experts that train in some stage."""
    kinds = {run.routed.spec.train if stage.train == "preset" else stage.train for stage in run.plan.stages}
    numbers = {"router": 0, "experts": 0}
    routed = run.routed
    for what in ("router", "experts"):
        if kinds & {what, "both"}:
            routed.set_trained("router" if what == "router" else "experts")
            numbers[what] = sum(parameter.numel() for parameter in routed.trained_parameters().values())
    routed.set_trained(routed.spec.train)
    return numbers


def _base(name: str) -> bool:
    return name.startswith("model.") and not name.endswith(("a_RD", "b_RO"))


def _seconds_per_step(run: Run) -> float:
    """Of the first stage's first step, with the gradients thrown away."""
    first = run.stage_data[0]
    part = first.sampler.batch(0)[0]
    inputs, _ = run.data.batch(part, run.routed.device)
    stage = run.plan.stages[0].train
    run.routed.set_trained(run.routed.spec.train if stage == "preset" else stage)
    spent = 0.0
    state = torch.get_rng_state()
    for _ in range(2):
        started = time.perf_counter()
        run.routed(**inputs).loss.backward()
        if run.routed.device.type == "cuda":
            torch.cuda.synchronize(run.routed.device)
        spent = time.perf_counter() - started
    torch.set_rng_state(state)
    run.routed.zero_grad(set_to_none=True)
    run.routed.set_trained(run.routed.spec.train)
    return spent * first.sampler.accumulation
