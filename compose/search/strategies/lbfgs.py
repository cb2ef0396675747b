"""Projected L-BFGS with backtracking, one independent row per start (Nocedal and Wright, algorithm 7.4 and 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from compose.search.space import Space

MEMORY = 8


class LbfgsState:
    """The ``method="lbfgs"`` of the gradient strategy; each ask is one trial point per active row."""

    needs_gradient = True

    def __init__(
        self,
        space: Space,
        points: np.ndarray,
        *,
        first_step: float,
        steps: int,
        race: int,
        patience: int,
        tolerance: float,
    ) -> None:
        self._rows = [_Row(space, point, first_step, patience, tolerance) for point in points]
        self._steps = steps
        self._race = race
        self._step = 0

    @property
    def done(self) -> bool:
        """All rows ended, or the steps are used up."""
        return self._step >= self._steps or not self._active()

    def ask(self) -> np.ndarray:
        """Return the active rows' trial points."""
        return np.stack([row.trial for row in self._active()])

    def tell(self, weights: np.ndarray, values: np.ndarray, gradients: np.ndarray | None) -> None:
        """Accept or shorten every active row's step."""
        if gradients is None:
            raise ValueError("the gradient strategy must be told gradients")
        for row, value, gradient in zip(self._active(), values.tolist(), gradients, strict=True):
            row.tell(value, gradient)
        self._step += 1
        if self._step == self._race:
            best = min(self._rows, key=lambda row: row.value)
            self._rows = [best]

    def close(self) -> None:
        """Hold nothing outside memory."""

    def _active(self) -> list[_Row]:
        return [row for row in self._rows if not row.done]


class _Row:
    def __init__(self, space: Space, point: np.ndarray, first_step: float, patience: int, tolerance: float) -> None:
        self._space = space
        self._first_step = first_step
        self._patience = patience
        self._tolerance = tolerance
        self.trial = point
        self.value = np.inf
        self.done = False
        self._point = point
        self._gradient = np.zeros_like(point)
        self._direction = np.zeros_like(point)
        self._length = 1.0
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._waited = 0

    def tell(self, value: float, gradient: np.ndarray) -> None:
        sound = bool(np.isfinite(gradient).all())
        if np.isinf(self.value) and not sound:
            self._waited += 1
            self.done = self._waited >= self._patience
            self.trial = 0.5 * self.trial
            return
        step = self.trial - self._point
        if np.isfinite(self.value) and not (sound and value <= self.value + 1e-4 * float(self._gradient @ step)):
            self._shorten(0.5 if sound else 0.1)
            return
        gain = self.value - value
        small = np.isfinite(self.value) and gain <= self._tolerance * abs(self.value)
        self._waited = self._waited + 1 if small else 0
        self._accept(value, gradient, step)
        self.done = self.done or self._waited >= self._patience

    def _accept(self, value: float, gradient: np.ndarray, step: np.ndarray) -> None:
        change = gradient - self._gradient
        if np.isfinite(self.value) and float(step @ change) > 1e-12 * float(change @ change):
            self._pairs = [*self._pairs, (step, change)][-MEMORY:]
        self._point, self.value, self._gradient = self.trial, value, gradient
        self._aim()

    def _shorten(self, factor: float) -> None:
        self._length *= factor
        if self._length < 1e-4:
            self.done = not self._pairs
            self._pairs = []
            self._aim()
            return
        self.trial = self._reach()

    def _aim(self) -> None:
        """Choose a direction within the free coordinates and the first trial along it."""
        bound = self._space.bound
        held = ((self._point >= bound) & (self._gradient < 0)) | ((self._point <= -bound) & (self._gradient > 0))
        slope = np.where(held, 0.0, self._gradient)
        if not np.abs(slope).max() > 1e-12:
            self.done = True
            return
        direction = np.where(held, 0.0, -_two_loops(slope, self._pairs))
        if self._space.l1 > 0:
            direction = np.where(direction * slope < 0, direction, 0.0)
        if not float(direction @ slope) < 0:
            self._pairs = []
            direction = -slope
        if not self._pairs:
            direction = direction * (self._first_step / np.abs(direction).max())
        self._direction = direction
        self._length = 1.0
        self.trial = self._reach()

    def _reach(self) -> np.ndarray:
        trial = self._space.clip(self._point + self._length * self._direction)
        if self._space.l1 > 0:
            trial = np.where(self._point * trial < 0, 0.0, trial)
        return trial


def _two_loops(gradient: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the inverse-Hessian product of L-BFGS."""
    result = gradient.copy()
    factors = []
    for step, change in reversed(pairs):
        factor = float(step @ result) / float(step @ change)
        result = result - factor * change
        factors.append(factor)
    if pairs:
        step, change = pairs[-1]
        result = result * (float(step @ change) / float(change @ change))
    for (step, change), factor in zip(pairs, reversed(factors), strict=True):
        result = result + (factor - float(change @ result) / float(step @ change)) * step
    return result
