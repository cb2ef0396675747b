"""Descent on the coefficients: Adam (arXiv:1412.6980) or L-BFGS, from several starts in parallel rows.

The base model is frozen, so value and gradient in all D coefficients cost about two to three forwards whatever D is;
LoRAHub's COBYLA spends D + 1 evaluations on one linear model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from compose.search.strategies.lbfgs import LbfgsState
from compose.search.strategy import STRATEGIES

if TYPE_CHECKING:
    from compose.search.space import Space
    from compose.search.strategy import StrategyState


@STRATEGIES.register("gradient")
@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Projected descent; L1 by the least-norm subgradient, and a coefficient that would cross 0 stops there.

    Attributes:
        method: "adam" or "lbfgs".
        learning_rate: Adam's step per coefficient; for L-BFGS the largest coefficient change of the first step.
        beta1: Adam's momentum. The objective has no sampling noise, and on random quadratics of 3 to 80 dimensions 0.7
            closes the gap to the minimum in half the steps of the usual 0.9.
        beta2: Adam's memory of squared gradients.
        steps: Evaluations per start.
        decay: The learning rate falls linearly to this share of itself at the last step (Adam).
        race: After so many steps only the start with the lowest value is kept; 0 keeps all.
        patience: A start ends when its best value gained less than ``tolerance`` (relative) in so many steps.
        tolerance: See ``patience``.
    """

    method: Literal["adam", "lbfgs"] = "adam"
    learning_rate: float = 0.1
    beta1: float = 0.7
    beta2: float = 0.99
    steps: int = 40
    decay: float = 0.1
    race: int = 0
    patience: int = 10
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        problems = []
        if self.method not in ("adam", "lbfgs"):
            problems.append(f"method must be 'adam' or 'lbfgs', got {self.method!r}")
        if not self.learning_rate > 0 or not 0 < self.decay <= 1:
            problems.append(f"need learning_rate > 0 and decay in (0, 1], got {self.learning_rate}, {self.decay}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            problems.append(f"beta1 and beta2 must be in [0, 1), got {self.beta1}, {self.beta2}")
        if self.steps < 1 or self.race < 0 or self.patience < 1 or self.tolerance < 0:
            problems.append(
                "need steps >= 1, race >= 0, patience >= 1, tolerance >= 0, "
                f"got {self.steps}, {self.race}, {self.patience}, {self.tolerance}"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def start(
        self, space: Space, *, seed: int = 0, evaluations: int = 1000, starts: np.ndarray | None = None
    ) -> StrategyState:
        """Begin at all ``starts``; default: 0 and the uniform 1/N. ``seed`` is ignored: nothing is random.

        Where the gradient at 0 vanishes (``space.zero_is_stationary``) a start at 0 becomes the uniform one.
        """
        if starts is None:
            starts = np.zeros((1, space.dimension))
            if not space.zero_is_stationary:
                starts = np.stack([starts[0], _uniform(space)])
        points = space.clip(np.array(starts, dtype=np.float64).reshape(-1, space.dimension))
        if space.zero_is_stationary:
            points[~points.any(axis=1)] = _uniform(space)
        points = np.array(list(dict.fromkeys(map(tuple, points.tolist()))))
        if self.method == "lbfgs":
            return LbfgsState(
                space, points, first_step=self.learning_rate, steps=self.steps, race=self.race,
                patience=self.patience, tolerance=self.tolerance,
            )  # fmt: skip
        return AdamState(self, space, points)


class AdamState:
    """One Adam per row; rows end on a plateau, a race keeps the best, a broken row steps back to its best point."""

    needs_gradient = True

    def __init__(self, options: Gradient, space: Space, points: np.ndarray) -> None:
        self._options = options
        self._space = space
        self._points = points
        self._mean = np.zeros_like(points)
        self._square = np.zeros_like(points)
        self._ages = np.zeros(len(points), dtype=np.int64)  # Adam's bias correction restarts with its moments
        self._rates = np.full(len(points), options.learning_rate)
        self._best_points = points.copy()
        self._best = np.full(len(points), np.inf)
        self._waited = np.zeros(len(points), dtype=np.int64)
        self._active = np.ones(len(points), dtype=bool)
        self._step = 0

    @property
    def done(self) -> bool:
        """All rows ended, or the steps are used up."""
        return self._step >= self._options.steps or not self._active.any()

    def ask(self) -> np.ndarray:
        """Return the active rows' points."""
        return self._points[self._active].copy()

    def tell(self, weights: np.ndarray, values: np.ndarray, gradients: np.ndarray | None) -> None:
        """Move every active row one step."""
        if gradients is None:
            raise ValueError("the gradient strategy must be told gradients")
        rows = np.flatnonzero(self._active)
        healthy = np.isfinite(gradients).all(axis=1)
        self._remember(rows, values, healthy)
        self._move(rows[healthy], gradients[healthy])
        self._step_back(rows[~healthy])
        self._step += 1
        self._active &= self._waited < self._options.patience
        if self._step == self._options.race:
            self._active &= np.arange(len(self._best)) == int(np.argmin(self._best))

    def close(self) -> None:
        """Hold nothing outside memory."""

    def _remember(self, rows: np.ndarray, values: np.ndarray, healthy: np.ndarray) -> None:
        for row, value, sound in zip(rows, values, healthy, strict=True):
            gain = self._best[row] - value
            # An infinite best is a row without a sound value so far; any sound one is progress.
            progress = sound and (np.isinf(self._best[row]) or gain > self._options.tolerance * abs(self._best[row]))
            self._waited[row] = 0 if progress else self._waited[row] + 1
            if sound and gain > 0:
                self._best[row] = value
                self._best_points[row] = self._points[row]

    def _move(self, rows: np.ndarray, gradients: np.ndarray) -> None:
        self._ages[rows] += 1
        ages = self._ages[rows, None]
        beta1, beta2 = self._options.beta1, self._options.beta2
        self._mean[rows] = beta1 * self._mean[rows] + (1 - beta1) * gradients
        self._square[rows] = beta2 * self._square[rows] + (1 - beta2) * np.square(gradients)
        mean = self._mean[rows] / (1 - beta1**ages)
        square = self._square[rows] / (1 - beta2**ages)
        progress = self._step / max(1, self._options.steps - 1)
        rates = self._rates[rows, None] * (1 - (1 - self._options.decay) * progress)
        old = self._points[rows]
        new = self._space.clip(old - rates * mean / (np.sqrt(square) + 1e-12))
        if self._space.l1 > 0:
            new = np.where((old * new < 0) | ((old == 0) & (gradients == 0)), 0.0, new)
        self._points[rows] = new

    def _step_back(self, rows: np.ndarray) -> None:
        known = np.isfinite(self._best[rows])[:, None]
        self._points[rows] = np.where(known, self._best_points[rows], 0.5 * self._points[rows])
        self._rates[rows] *= 0.5
        self._mean[rows] = 0.0
        self._square[rows] = 0.0
        self._ages[rows] = 0


def _uniform(space: Space) -> np.ndarray:
    return np.full(space.dimension, min(1.0 / space.num_adapters, space.bound))
