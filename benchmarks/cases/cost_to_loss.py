"""Seconds to the training loss that LoRAHub's forty evaluations reach."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import demo
import lorahub_baseline
import numpy as np
import torch
from registry import Check, Measured, Point, Settings, case
from timing import Timing

import compose
from compose.bank import Bank
from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Combine
from compose.fewshot.population import PopulationObjective
from compose.fewshot.procedure import DEFAULT_BUDGET
from compose.search.evaluator import Budget
from compose.search.objective import Evaluation
from compose.search.procedure import search
from compose.search.space import Space
from compose.search.strategies.cobyla import Cobyla
from compose.text.encoding import Encoded


@case(
    "cost_to_loss",
    description="seconds until a search has evaluated weights as good on 5 shots as LoRAHub's 40 evaluations found",
    baseline="LoRAHub through PEFT: factor sums, COBYLA from 0, 40 evaluations one by one",
    targets="auto >= 4x sooner",
)
def cost_to_loss(settings: Settings) -> Iterator[Point]:
    """Yield both ways to combine; every point runs six held-out tasks (three new wordings, three compositions)."""
    built = _Built.of(bank_size=8 if settings.quick else 20)
    names = demo.TASK_NAMES[:1] if settings.quick else demo.TASK_NAMES
    for combine in ("outputs", "parameters"):
        yield _point(built, names, combine, settings)


@dataclass
class _Recorded:
    """An objective that notes when a candidate first had a mean loss of at most ``wanted``."""

    objective: PopulationObjective
    wanted: float
    start: float = field(default_factory=time.process_time)
    reached_s: float = float("inf")
    best: float = float("inf")

    @property
    def example_weights(self) -> np.ndarray:
        return self.objective.example_weights

    @property
    def differentiable(self) -> bool:
        return self.objective.differentiable

    def __call__(
        self, weights: np.ndarray, *, gradient: bool = False, example_weights: np.ndarray | None = None
    ) -> Evaluation:
        found = self.objective(weights, gradient=gradient, example_weights=example_weights)
        self.best = min(self.best, float(found.losses.mean(1).min()))
        if self.best <= self.wanted and self.reached_s == float("inf"):
            self.reached_s = time.process_time() - self.start
        return found


@dataclass(frozen=True)
class _Built:
    """Two instances of the demo's base: ours with the bank attached, and the one PEFT takes.

    ``original`` holds the adapters as they are, ``aligned`` the same with one rank and scaling: what LoRAHub searches.
    """

    original: AttachedModel
    aligned: AttachedModel

    @classmethod
    def of(cls, bank_size: int) -> _Built:
        bank = demo.bank(bank_size)
        aligned = demo.aligned([bank[name] for name in bank.names])
        return cls(compose.attach(demo.base(), bank), compose.attach(demo.base(), Bank.from_adapters(aligned)))

    def lorahub(self, examples: list[Encoded]) -> lorahub_baseline.LoraHub:
        adapters = [self.aligned.bank[name] for name in self.aligned.bank.names]
        return lorahub_baseline.LoraHub.build(demo.base(), adapters, examples, device="cpu")

    def objective(self, examples: list[Encoded], combine: Combine) -> PopulationObjective:
        attached = self.original if combine == "outputs" else self.aligned
        return PopulationObjective(attached, examples, combine=combine)


@dataclass(frozen=True)
class _Race:
    """What one task gave: CPU seconds of LoRAHub, of auto until LoRAHub's loss, and of auto in all; losses."""

    lorahub_s: float
    reached_s: float
    auto_s: float
    base: float
    lorahub: float
    auto: float


def _point(built: _Built, names: Sequence[str], combine: Combine, settings: Settings) -> Point:
    def gate() -> None:
        examples = demo.task_shots(names[0])
        baseline, size = built.lorahub(examples), len(built.aligned.bank)
        weights = np.random.default_rng(0).uniform(-0.5, 0.5, (3, size))
        ours = built.objective(examples, "parameters")(weights).losses
        theirs = torch.tensor([baseline.loss(row) for row in weights.tolist()], dtype=torch.float64)
        found = torch.from_numpy(lorahub_baseline.token_mean(ours, examples))
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)
        # One adapter at w with outputs summed is that adapter at sqrt(w) in both factors.
        one = 0.64 * np.eye(size)[:3] + 1e-12
        outputs = built.objective(examples, "outputs")(one).losses
        factors = built.objective(examples, "parameters")(np.sqrt(one)).losses
        torch.testing.assert_close(outputs, factors, rtol=1e-4, atol=1e-4)

    def measure() -> Measured:
        races = [_race(built, demo.task_shots(name), combine, settings) for name in names]
        ratios = [race.lorahub_s / race.reached_s for race in races]
        target = None if settings.quick else 4.0
        checks = [Check("sooner at LoRAHub's loss, median task", float(np.median(ratios)), ">=", target, "x")]
        for name, ratio, race in zip(names, ratios, races, strict=True):
            losses = f"loss base {race.base:.2f}, LoRAHub {race.lorahub:.2f}, auto {race.auto:.2f}"
            checks.append(Check(f"{name} ({losses})", ratio, unit="x"))
        checks.append(Check("whole auto search / LoRAHub, median task", _whole(races), unit="x"))
        mine, theirs = ([getattr(race, key) for race in races] for key in ("reached_s", "lorahub_s"))
        return Measured(checks, Timing(tuple(mine)), Timing(tuple(theirs)), note="the samples are the tasks")

    return Point(f"demo model, 5 shots, combine={combine}", gate, measure)


def _whole(races: Sequence[_Race]) -> float:
    return float(np.median([race.auto_s / race.lorahub_s for race in races]))


def _race(built: _Built, examples: list[Encoded], combine: Combine, settings: Settings) -> _Race:
    size = len(built.aligned.bank)
    lorahub_s, weights = _run_lorahub(built.lorahub(examples), size, 5 if settings.quick else lorahub_baseline.BUDGET)
    judged = built.objective(examples, "parameters")(np.stack([weights, np.zeros(size)])).losses.mean(1)
    recorded = _Recorded(built.objective(examples, combine), float(judged[0]) + 1e-6)
    space = Space(num_adapters=size, l1=0.05, zero_is_stationary=combine == "parameters")
    search(recorded, space, strategy="auto", budget=Budget(cost=30 if settings.quick else DEFAULT_BUDGET))
    auto_s = time.process_time() - recorded.start
    return _Race(lorahub_s, recorded.reached_s, auto_s, float(judged[1]), float(judged[0]), recorded.best)


def _run_lorahub(baseline: lorahub_baseline.LoraHub, size: int, evaluations: int) -> tuple[float, np.ndarray]:
    """Return CPU seconds of the procedure and the best weights it evaluated, by its own score."""
    space = Space(num_adapters=size, bound=lorahub_baseline.BOUND)
    start = time.process_time()
    state = Cobyla().start(space, evaluations=evaluations)
    best, best_score = np.zeros(size), float("inf")
    for _ in range(evaluations):
        if state.done:
            break
        asked = state.ask()
        scores = np.array([baseline.score(row) for row in asked])
        if scores[0] < best_score:
            best, best_score = asked[0].copy(), float(scores[0])
        state.tell(asked, scores, None)
    state.close()
    return time.process_time() - start, best
