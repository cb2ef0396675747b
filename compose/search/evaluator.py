"""Spends the budget: evaluates populations, counts cost, keeps a cache, the history and the best candidate seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from compose.errors import IncompatibleError
from compose.search.objective import Evaluation, Objective, cleaned, normalised_example_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from compose.search.space import Space

ASSUMED_GRADIENT_COST = 3.0
"""Forward-equivalents of one value with gradient, until the objective has reported what it costs."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend; the first limit reached ends it.

    Attributes:
        cost: Forward-equivalents (one forward of one candidate over all examples is 1), or None.
        evaluations: Candidates evaluated, with or without gradient (LoRAHub's count), or None.
    """

    cost: float | None = None
    evaluations: int | None = None

    def __post_init__(self) -> None:
        if self.cost is None and self.evaluations is None:
            raise IncompatibleError("a budget needs cost (forward-equivalents), evaluations, or both")
        for name, value in (("cost", self.cost), ("evaluations", self.evaluations)):
            if value is not None and not value >= 1:
                raise IncompatibleError(f"budget {name} must be at least 1, got {value}")


class Progress(NamedTuple):
    """One report to the progress callback, after every population."""

    stage: str
    evaluations: int
    cost: float
    best_value: float
    budget: Budget


class Best(NamedTuple):
    """The candidate of lowest full-data penalised value."""

    weights: np.ndarray
    value: float
    losses: np.ndarray


class Evaluator:
    """Evaluates rows ``(P, D)`` of one space within one budget.

    Values repeat free of charge: a candidate evaluated before without gradient is answered from memory.

    Attributes:
        example_weights: ``(S,)``, normalised.
        differentiable: Whether the objective has gradients.
        evaluations: Candidates evaluated so far.
        cost: Forward-equivalents spent so far.
        invalid: Candidates with a loss or gradient that was not finite.
        history: ``(cost, best full-data penalised value)`` after every population.
        best: The best candidate so far.
        stage: Name of the running stage, for progress reports.
    """

    def __init__(
        self, objective: Objective, space: Space, budget: Budget, progress: Callable[[Progress], None] | None = None
    ) -> None:
        self._objective = objective
        self._space = space
        self.budget = budget
        self._progress = progress
        self.differentiable = bool(objective.differentiable)
        self.example_weights = normalised_example_weights(objective)
        self.evaluations = 0
        self.cost = 0.0
        self.invalid = 0
        self.history: list[tuple[float, float]] = []
        self.best = Best(np.zeros(space.dimension), np.inf, np.zeros(len(self.example_weights)))
        self.stage = ""
        self._rates = {False: 1.0, True: ASSUMED_GRADIENT_COST}
        self._measured = {False: False, True: False}
        self._cache: dict[bytes, np.ndarray] = {}

    def rate(self, gradient: bool) -> float:
        """Return the largest cost per candidate reported so far, or an assumption before the first report."""
        return self._rates[gradient]

    def affordable(self, gradient: bool, cost_limit: float = np.inf) -> int:
        """Return how many candidates can be paid for now, also keeping the total cost within ``cost_limit``."""
        left = np.inf if self.budget.cost is None else self.budget.cost - self.cost
        left = min(left, cost_limit - self.cost)
        count = np.inf if self.budget.evaluations is None else self.budget.evaluations - self.evaluations
        count = min(count, np.floor(left / self._rates[gradient] + 1e-9))
        return int(min(max(count, 0), 2**31))

    def unpaid(self, weights: np.ndarray, gradient: bool) -> int:
        """Return how many of the rows would have to be evaluated, i.e. are not in memory."""
        return len(weights) if gradient else len(self._new_rows(weights))

    def losses(self, weights: np.ndarray) -> np.ndarray:
        """Return losses ``(P, S)``, all finite; distinct new rows are evaluated once each, in order."""
        new = self._new_rows(weights)
        if new:
            evaluation = self._evaluate(weights[list(new.values())], gradient=False, example_weights=None)
            for key, losses in zip(new, evaluation.losses, strict=True):
                self._cache[key] = losses
        return np.stack([self._cache[_key(row)] for row in weights])

    def losses_and_gradients(self, weights: np.ndarray, example_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return losses ``(P, S)`` and gradients ``(P, D)`` of each row's own weighted mean; broken rows hold NaN.

        Raises:
            IncompatibleError: The objective has no gradients.
        """
        evaluation = self._evaluate(weights, gradient=True, example_weights=example_weights)
        if evaluation.gradients is None:
            raise IncompatibleError(
                "this objective gives no gradients; choose a strategy without them (cma, cobyla, greedy, random)"
            )
        for row, losses in zip(weights, evaluation.losses, strict=True):
            self._cache.setdefault(_key(row), losses)
        return evaluation.losses, evaluation.gradients

    def values(self, weights: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """Return full-data penalised values ``(P,)``."""
        return losses @ self.example_weights + self._space.penalty(weights)

    def _new_rows(self, weights: np.ndarray) -> dict[bytes, int]:
        new: dict[bytes, int] = {}
        for number, row in enumerate(weights):
            key = _key(row)
            if key not in self._cache:
                new.setdefault(key, number)
        return new

    def _evaluate(self, weights: np.ndarray, *, gradient: bool, example_weights: np.ndarray | None) -> Evaluation:
        raw = self._objective(weights.copy(), gradient=gradient, example_weights=example_weights)
        count = len(weights)
        evaluation, invalid = cleaned(raw, (count, len(self.example_weights)), weights.shape)
        self.invalid += invalid
        self.evaluations += count
        self.cost += evaluation.cost
        rate = max(evaluation.cost / count, 1e-9)
        self._rates[gradient] = max(rate, self._rates[gradient]) if self._measured[gradient] else rate
        self._measured[gradient] = True
        values = self.values(weights, evaluation.losses)
        first = int(np.argmin(values))
        if values[first] < self.best.value:
            self.best = Best(weights[first].copy(), float(values[first]), evaluation.losses[first].copy())
        self.history.append((self.cost, self.best.value))
        if self._progress is not None:
            self._progress(Progress(self.stage, self.evaluations, self.cost, self.best.value, self.budget))
        return evaluation


def _key(row: np.ndarray) -> bytes:
    return (row + 0.0).tobytes()  # + 0.0 makes -0.0 and 0.0 one key
