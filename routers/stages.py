"""Staged training as data: what trains, for how long, on which records, at which rate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from compose.errors import IncompatibleError, unknown_name
from compose.routers.records import MixedExample
from compose.routers.sampling import Sampling, TaskSampler

StageTrains = Literal["preset", "router", "experts", "both"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a training run.

    Attributes:
        name: Told in logs and checkpoints; the seed of the stage's batches depends on it.
        train: What trains; ``"preset"``: what the mixture's specification says.
        steps: Optimiser steps; None: as ``epochs`` says. One of them is given.
        epochs: Times as many records are drawn as the stage has.
        learning_rate: The highest, of the router, and of the experts where they have none of their own.
        expert_learning_rate: The highest of the experts; None: ``learning_rate``.
        schedule: How the rates fall after warm-up; see `rate_factor`.
        warmup: Steps of the linear rise from 0.
        final: Factor of the rates that the schedule falls to, in [0, 1].
        sampling: Shares of tasks and kind of batches; None: the run's.
        batch_size: Records per step; None: the run's.
        accumulation: Micro-batches per step; None: the run's.
        tasks: Only records of these tasks; empty: of all.
        experts: Only records labelled with these experts; empty: with any or none.
    """

    name: str
    train: StageTrains = "preset"
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-3
    expert_learning_rate: float | None = None
    schedule: Schedule = "constant"
    warmup: int = 0
    final: float = 0.0
    sampling: Sampling | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    tasks: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if problems := [*_size_problems(self), *_rate_problems(self)]:
            raise IncompatibleError("; ".join(problems))

    def factor(self, step: int, total: int) -> float:
        """Factor of the learning rates in step ``step`` of ``total``."""
        return rate_factor(self.schedule, step, total=total, warmup=self.warmup, final=self.final)

    def select(self, examples: Sequence[MixedExample]) -> list[int]:
        """Return the positions of the stage's records, in order.

        Raises:
            IncompatibleError: It names a task or expert that no record has, or no record is left.
        """
        _check_known("task", self.tasks, {each.task for each in examples}, self.name)
        _check_known("expert", self.experts, {each.expert for each in examples if each.expert}, self.name)
        kept = [
            number
            for number, each in enumerate(examples)
            if (not self.tasks or each.task in self.tasks) and (not self.experts or each.expert in self.experts)
        ]
        if not kept:
            raise IncompatibleError(f"stage {self.name!r} has no records: none has one of its tasks and experts both")
        return kept

    def seed(self, run_seed: int) -> int:
        """Seed of the stage's batches, other for every stage of a run."""
        digest = hashlib.blake2b(repr((run_seed, self.name)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def rate_factor(schedule: Schedule, step: int, *, total: int, warmup: int = 0, final: float = 0.0) -> float:
    """Factor of the learning rate in step ``step``, counted from 0; with ``final`` 0 that of transformers' schedules.

    ``step / warmup`` during warm-up, so the first of its steps is at rate 0; after it, with ``p`` from 0 to 1 the part
    of the remaining steps that is done, 1 (constant), ``1 - p`` (linear) or ``(1 + cos(pi p)) / 2`` (cosine), scaled
    to end at ``final``. Past ``total`` it stays at the end.

    Args:
        schedule: See above.
        step: From 0.
        total: Steps in all.
        warmup: Steps of the rise.
        final: In [0, 1]; constant rates do not fall.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    falling = 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return final + (1.0 - final) * falling


class Place(NamedTuple):
    """Where a step of the run lies: number of its stage, and the step within it."""

    stage: int
    step: int


@dataclass(frozen=True)
class Plan:
    """Stages one after the other, each with its number of steps.

    Attributes:
        stages: With different names.
        steps: Of each stage.
    """

    stages: tuple[Stage, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        check_stages(self.stages)
        if len(self.steps) != len(self.stages) or any(count < 1 for count in self.steps):
            raise IncompatibleError(f"{len(self.stages)} stages need as many numbers of steps >= 1, got {self.steps}")
        for stage, count in zip(self.stages, self.steps, strict=True):
            if stage.warmup >= count:
                raise IncompatibleError(f"stage {stage.name!r}: warmup {stage.warmup} takes all of its {count} steps")

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return sum(self.steps)

    def place(self, step: int) -> Place:
        """Return where step ``step`` of the run lies, counted from 0; ``total`` is the end of the last stage.

        Raises:
            IncompatibleError: It is negative or behind the end.
        """
        if not 0 <= step <= self.total:
            raise IncompatibleError(f"step {step} is not one of this run, which has {self.total}")
        for number, count in enumerate(self.steps):
            if step < count:
                return Place(number, step)
            step -= count
        return Place(len(self.steps) - 1, self.steps[-1])

    def rates(self, step: int) -> tuple[float, float]:
        """Learning rates of router and experts in step ``step`` of the run."""
        number, inside = self.place(step)
        stage = self.stages[number]
        factor = stage.factor(inside, self.steps[number])
        experts = stage.learning_rate if stage.expert_learning_rate is None else stage.expert_learning_rate
        return factor * stage.learning_rate, factor * experts


def plan_stages(
    stages: Sequence[Stage],
    examples: Sequence[MixedExample],
    *,
    sampling: Sampling,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
) -> tuple[Plan, tuple[TaskSampler, ...]]:
    """Return the plan of a run, and for each stage the sampler of its batches, as positions in ``examples``.

    Args:
        stages: In order.
        examples: All records of the run.
        sampling: Of stages that say nothing else; so are the next two.
        batch_size: Records per step.
        accumulation: Micro-batches per step.
        seed: Of the run.

    Raises:
        IncompatibleError: Stages that cannot be, or have no records; each is named.
    """
    check_stages(stages)
    samplers = []
    for stage in stages:
        keep = stage.select(examples)
        try:
            sampler = TaskSampler(
                examples,
                stage.sampling or sampling,
                batch_size=stage.batch_size or batch_size,
                accumulation=stage.accumulation or accumulation,
                seed=stage.seed(seed),
                keep=keep,
            )
        except IncompatibleError as error:
            raise IncompatibleError(f"stage {stage.name!r}: {error}") from None
        samplers.append(sampler)
    steps = [
        sampler.num_steps(stage.epochs) if stage.epochs is not None else int(stage.steps or 0)
        for stage, sampler in zip(stages, samplers, strict=True)
    ]
    return Plan(tuple(stages), tuple(steps)), tuple(samplers)


def check_stages(stages: Sequence[Stage], *, empty: bool = False) -> None:
    """Check that names of stages differ, and that there are stages unless there may be none (``empty``).

    Raises:
        IncompatibleError: Otherwise.
    """
    if not stages and not empty:
        raise IncompatibleError("a training run needs at least one stage")
    names = [stage.name for stage in stages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise IncompatibleError(f"stages need different names; {', '.join(twice)} is there more than once")


def _size_problems(stage: Stage) -> list[str]:
    problems = []
    if not stage.name:
        problems.append("a stage needs a name")
    if (stage.steps is None) == (stage.epochs is None):
        problems.append(f"needs steps or epochs, one of them; got {stage.steps} and {stage.epochs}")
    for name in ("steps", "batch_size", "accumulation"):
        value = getattr(stage, name)
        if value is not None and value < 1:
            problems.append(f"{name} must be at least 1, got {value}")
    if stage.epochs is not None and not (math.isfinite(stage.epochs) and stage.epochs > 0):
        problems.append(f"epochs must be a number > 0, got {stage.epochs}")
    return problems


def _rate_problems(stage: Stage) -> list[str]:
    problems = []
    for name, allowed in (("train", StageTrains), ("schedule", Schedule)):
        if getattr(stage, name) not in get_args(allowed):
            problems.append(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(stage, name)!r}")
    for name in ("learning_rate", "expert_learning_rate"):
        value = getattr(stage, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            problems.append(f"{name} must be a number > 0, got {value}")
    if stage.expert_learning_rate is not None and stage.train == "router":
        problems.append("expert_learning_rate goes with stages that train experts")
    if stage.warmup < 0 or (stage.steps is not None and stage.warmup >= stage.steps > 0):
        problems.append(f"warmup must lie in 0..steps - 1, got {stage.warmup} of {stage.steps}")
    if not 0 <= stage.final <= 1 or (stage.final and stage.schedule == "constant"):
        problems.append(f"final must lie in [0, 1] and goes with linear and cosine schedules, got {stage.final}")
    return problems


def _check_known(kind: str, names: Sequence[str], known: Collection[str], stage: str) -> None:
    problems = [unknown_name(f"{kind} among the records", name, sorted(known)) for name in names if name not in known]
    if problems:
        raise IncompatibleError(f"stage {stage!r}: " + "; ".join(problems))
