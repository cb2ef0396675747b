"""Seconds to the training loss that LoRAHub's forty evaluations reach."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import lorahub_baseline
import models
import numpy as np
import torch
from registry import Check, Measured, Point, Settings, case
from timing import Timing

import compose
from compose.bank import Bank
from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Coefficients, Combine
from compose.fewshot.encoding import Encoded
from compose.fewshot.population import PopulationObjective
from compose.search.evaluator import Budget
from compose.search.objective import Evaluation
from compose.search.procedure import search
from compose.search.space import Space
from compose.search.strategies.cobyla import Cobyla

BUDGET_AUTO = 400.0
PLANTED = {3: 0.9, 11: 0.6, 17: -0.4}


@case(
    "cost_to_loss",
    description="seconds until a search has evaluated weights as good on 5 shots as LoRAHub's 40 evaluations found",
    baseline="LoRAHub through PEFT: factor sums, COBYLA from 0, 40 evaluations one by one",
    targets="auto >= 4x sooner",
)
def cost_to_loss(settings: Settings) -> Iterator[Point]:
    """Yield both ways to combine on the demo-size Llama; three draws of shots each."""
    for combine in ("parameters", "outputs"):
        for draw in range(1 if settings.quick else 3):
            yield _point(_build(settings, draw), combine, f"draw {draw}, combine={combine}", settings)


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
    attached: AttachedModel
    baseline: lorahub_baseline.LoraHub
    examples: list[Encoded]

    @property
    def num_adapters(self) -> int:
        return len(self.attached.bank)


def _build(settings: Settings, draw: int) -> _Built:
    """Shots whose responses a hidden factor sum of three adapters writes: both sides can express it."""
    name, count, rank = ("llama-tiny", 20, 2) if settings.quick else ("llama-demo", 20, 8)
    model = _sharp(models.build(name))
    adapters = models.random_adapters(model, name, count, rank, strength=0.5)
    attached = compose.attach(model, Bank.from_adapters(adapters))
    vocab = models.MODELS[name].config["vocab_size"]
    lengths = ((6, 9), (3, 4)) if settings.quick else ((22, 26, 31, 24, 28), (7, 9, 12, 8, 10))
    prompts = models.random_examples(vocab, *lengths, seed=draw)
    planted = torch.zeros(count)
    for index, weight in PLANTED.items():
        planted[index] = weight
    with attached.using(Coefficients(planted, "parameters")):
        examples = [_answered(attached, example) for example in prompts]
    other = _sharp(models.build(name))
    return _Built(attached, lorahub_baseline.LoraHub.build(other, adapters, examples, device="cpu"), examples)


def _sharp(model: torch.nn.Module) -> torch.nn.Module:
    """Make a random model's predictions as confident as a trained one's."""
    model.get_output_embeddings().weight.mul_(12.0)  # type: ignore[operator]
    return model


def _answered(attached: AttachedModel, example: Encoded) -> Encoded:
    tokens = list(example.prompt)
    for _ in example.response:
        with torch.no_grad():
            logits = attached.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return Encoded(example.prompt, tuple(tokens[len(example.prompt) :]))


def _point(built: _Built, combine: Combine, label: str, settings: Settings) -> Point:
    parameters = PopulationObjective(built.attached, built.examples, combine="parameters")

    def gate() -> None:
        weights = np.random.default_rng(0).uniform(-0.5, 0.5, (3, built.num_adapters))
        ours = torch.from_numpy(lorahub_baseline.token_mean(parameters(weights).losses, built.examples))
        theirs = torch.tensor([built.baseline.loss(row) for row in weights.tolist()], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    def measure() -> Measured:
        baseline_s, weights = _run_lorahub(built, 5 if settings.quick else lorahub_baseline.BUDGET)
        wanted = float(parameters(weights[None]).losses.mean())
        base = float(parameters(np.zeros((1, built.num_adapters))).losses.mean())
        objective = PopulationObjective(built.attached, built.examples, combine=combine)
        recorded = _Recorded(objective, wanted)
        space = Space(num_adapters=built.num_adapters, l1=0.05, zero_is_stationary=combine == "parameters")
        result = search(recorded, space, strategy="auto", budget=Budget(cost=60 if settings.quick else BUDGET_AUTO))
        total = time.process_time() - recorded.start
        note = f"training loss: base {base:.3f}, LoRAHub {wanted:.3f}, auto's best {recorded.best:.3f}; {result.why}"
        target = None if settings.quick else 4.0
        checks = [
            Check("sooner at LoRAHub's loss", baseline_s / recorded.reached_s, ">=", target, "x"),
            Check("auto, whole search", total, unit="s"),
            Check("auto, forward-equivalents", result.cost),
        ]
        return Measured(checks, Timing((recorded.reached_s,)), Timing((baseline_s,)), note)

    return Point(label, gate, measure)


def _run_lorahub(built: _Built, evaluations: int) -> tuple[float, np.ndarray]:
    """Return CPU seconds of the procedure and the best weights it evaluated, by its own score."""
    space = Space(num_adapters=built.num_adapters, bound=lorahub_baseline.BOUND)
    start = time.process_time()
    state = Cobyla().start(space, evaluations=evaluations)
    best, best_score = np.zeros(built.num_adapters), float("inf")
    for _ in range(evaluations):
        if state.done:
            break
        asked = state.ask()
        scores = np.array([built.baseline.score(row) for row in asked])
        if scores[0] < best_score:
            best, best_score = asked[0].copy(), float(scores[0])
        state.tell(asked, scores, None)
    state.close()
    return time.process_time() - start, best
