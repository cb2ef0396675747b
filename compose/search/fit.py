"""Runs one strategy on all examples and on every fold in lockstep: all rows of a step are one population."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from compose.search.evaluator import Evaluator
    from compose.search.guard import Guard
    from compose.search.space import Space
    from compose.search.strategy import StrategyState

FREE_POPULATIONS = 100
"""A strategy that asks for so many populations in a row that are all in memory is going in circles: the fit ends."""


class Point(NamedTuple):
    """A recommendation: ``(D,)`` weights in the full space, their ``(S,)`` losses, and the training value."""

    weights: np.ndarray
    losses: np.ndarray
    value: float


@dataclass
class Lane:
    """One fit: the examples it averages over, the examples held out, and what it has recommended so far.

    Attributes:
        example_weights: ``(S,)``, summing to 1, 0 for held-out examples.
        held_out: Indices of the examples this lane never saw; empty for the lane of all examples.
        trace: The best point by training value after every step.
    """

    example_weights: np.ndarray
    held_out: np.ndarray
    trace: list[Point] = field(default_factory=list)

    def at(self, step: int) -> Point:
        """Return the recommendation after a step; a lane that ended early keeps its last one."""
        return self.trace[min(step, len(self.trace) - 1)]

    def record(self, rows: np.ndarray, losses: np.ndarray, values: np.ndarray) -> None:
        """Enter one step's population, rows in the full space."""
        best = int(np.argmin(values))
        point = Point(rows[best].copy(), losses[best].copy(), float(values[best]))
        if self.trace and self.trace[-1].value <= point.value:
            point = self.trace[-1]
        self.trace.append(point)

    def fresh(self) -> Lane:
        """Return the same lane without its trace."""
        return Lane(self.example_weights, self.held_out)


def make_lanes(example_weights: np.ndarray, folds: list[np.ndarray]) -> list[Lane]:
    """Return the lane of all examples, then one per fold."""
    lanes = [Lane(example_weights, np.zeros(0, dtype=np.int64))]
    for held_out in folds:
        kept = example_weights.copy()
        kept[held_out] = 0.0
        lanes.append(Lane(kept / kept.sum(), held_out))
    return lanes


def validated_losses(points: list[Point], lanes: list[Lane]) -> np.ndarray | None:
    """Return ``(S,)``: each example's loss under its fold's point; 0 for examples of weight 0; None without folds."""
    if len(lanes) == 1:
        return None
    losses = np.zeros(len(lanes[0].example_weights))
    for point, lane in zip(points[1:], lanes[1:], strict=True):
        losses[lane.held_out] = point.losses[lane.held_out]
    return losses


class Fit(NamedTuple):
    """A finished fit.

    Attributes:
        points: Per lane, the recommendation after the chosen step.
        steps: Steps run.
        chosen_step: The step of lowest validated loss; the last one without folds.
    """

    points: list[Point]
    steps: int
    chosen_step: int


def run_lanes(
    evaluator: Evaluator,
    space: Space,
    fitted: Space,
    lanes: list[Lane],
    states: list[StrategyState],
    guard: Guard,
    cost_limit: float = np.inf,
) -> Fit | None:
    """Advance all lanes together until they are done, the budget is spent, or the validated loss stops improving.

    Args:
        evaluator: Answers rows of ``space``.
        space: The full space.
        fitted: The space the states search: ``space`` or its scalars.
        lanes: Fresh lanes; their traces are filled.
        states: One per lane, all of one strategy.
        guard: Its patience.
        cost_limit: Total cost not to exceed, on top of the budget.

    Returns:
        The fit, or None when not even one step could be paid for.
    """
    scores: list[float] = []
    free = 0
    try:
        while (live := [i for i, state in enumerate(states) if not state.done]) and free < FREE_POPULATIONS:
            before = evaluator.evaluations
            if not _advance(evaluator, space, fitted, [lanes[i] for i in live], [states[i] for i in live], cost_limit):
                break
            free = free + 1 if evaluator.evaluations == before else 0
            scores.append(_score(lanes, evaluator.example_weights))
            if len(lanes) > 1 and len(scores) - _first_lowest(scores) > guard.patience:
                break
    finally:
        for state in states:
            state.close()
    if not lanes[0].trace:
        return None
    steps = len(lanes[0].trace) if len(lanes) == 1 else len(scores)
    chosen = steps - 1 if len(lanes) == 1 else _first_lowest(scores)
    return Fit([lane.at(chosen) for lane in lanes], steps, chosen)


def _score(lanes: list[Lane], example_weights: np.ndarray) -> float:
    losses = validated_losses([lane.trace[-1] for lane in lanes], lanes)
    return 0.0 if losses is None else float(example_weights @ losses)


def _first_lowest(scores: list[float]) -> int:
    """Return the first step within a thousandth of the lowest score: later steps must earn their place."""
    lowest = min(scores)
    return next(step for step, score in enumerate(scores) if score <= lowest + 1e-3 * abs(lowest))


def _advance(
    evaluator: Evaluator,
    space: Space,
    fitted: Space,
    lanes: list[Lane],
    states: list[StrategyState],
    cost_limit: float,
) -> bool:
    """Run one ask-evaluate-tell of all lanes; return False when it was cut short by the budget."""
    gradient = states[0].needs_gradient
    asked = [state.ask() for state in states]
    counts = [len(rows) for rows in asked]
    total = sum(counts)
    fitted_rows = np.concatenate(asked)
    rows = fitted_rows if fitted.dimension == space.dimension else space.expand(fitted_rows)
    affordable = evaluator.affordable(gradient, cost_limit)
    cut = total
    if evaluator.unpaid(rows, gradient) > affordable:
        if len(lanes) > 1:
            return False
        cut = _longest_prefix(evaluator, rows, gradient, affordable)
        if cut == 0:
            return False
    row_lanes = np.repeat(np.arange(len(lanes)), counts)[:cut]
    example_weights = np.stack([lane.example_weights for lane in lanes])[row_lanes]
    rows, fitted_rows = rows[:cut], fitted_rows[:cut]
    gradients = None
    if gradient:
        losses, full_gradients = evaluator.losses_and_gradients(rows, example_weights)
        reduced = full_gradients if fitted.dimension == space.dimension else space.reduce(full_gradients)
        gradients = fitted.penalised_gradient(fitted_rows, reduced)
    else:
        losses = evaluator.losses(rows)
    values = (losses * example_weights).sum(axis=1) + fitted.penalty(fitted_rows)
    for number, (lane, state) in enumerate(zip(lanes, states, strict=True)):
        mine = row_lanes == number
        lane.record(rows[mine], losses[mine], values[mine])
        if cut == total:
            state.tell(fitted_rows[mine], values[mine], None if gradients is None else gradients[mine])
    return cut == total


def _longest_prefix(evaluator: Evaluator, rows: np.ndarray, gradient: bool, affordable: int) -> int:
    return max(
        (count for count in range(1, len(rows) + 1) if evaluator.unpaid(rows[:count], gradient) <= affordable),
        default=0,
    )
