"""Greedy forward selection: change the one adapter, to the one weight of a grid, that lowers the value most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compose.search.strategy import STRATEGIES

if TYPE_CHECKING:
    from compose.search.space import Space


@STRATEGIES.register("greedy")
@dataclass(frozen=True, kw_only=True)
class Greedy:
    """All candidates of a round are one population of ``N * len(grid)`` rows; coefficients are equal in all groups.

    A later round may also move an adapter chosen before to another weight of the grid. Greedy selection of ensemble
    members: Caruana et al., ICML 2004.

    Attributes:
        grid: Weights to try; values beyond the bound are cut to it.
        max_adapters: Largest number of adapters on at once.
        tolerance: Smallest gain, relative to the current value's size, that starts another round.
        adapters: The adapters that may change; None: all.
    """

    grid: tuple[float, ...] = (-0.5, 0.25, 0.5, 1.0)
    max_adapters: int = 6
    tolerance: float = 1e-3
    adapters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.grid or self.max_adapters < 1:
            raise ValueError(f"grid must not be empty and max_adapters >= 1, got {self.grid}, {self.max_adapters}")

    def start(
        self, space: Space, *, seed: int = 0, evaluations: int = 1000, starts: np.ndarray | None = None
    ) -> GreedyState:
        """Begin at the first start (default 0), averaged over its groups; ``seed`` is ignored: nothing is random."""
        first = np.zeros(space.num_adapters)
        if starts is not None:
            first = space.clip(starts)[0].reshape(space.num_groups, space.num_adapters).mean(axis=0)
        return GreedyState(self, space, first)


class GreedyState:
    """The first question is the start itself; ties go to the first adapter, then the first weight of the grid."""

    needs_gradient = False

    def __init__(self, options: Greedy, space: Space, first: np.ndarray) -> None:
        self._options = options
        self._space = space
        self._current = first
        self._value = np.inf
        self._grid = tuple(dict.fromkeys(float(v) for v in space.clip(np.asarray(options.grid))))
        self._asked = first[None, :]
        self._done = False

    @property
    def done(self) -> bool:
        """Whether the last round gained too little."""
        return self._done

    def ask(self) -> np.ndarray:
        """Return all single-adapter changes of the current point (at first the start alone)."""
        if np.isfinite(self._value):
            self._asked = self._neighbours()
        return self._space.expand(self._asked)

    def tell(self, weights: np.ndarray, values: np.ndarray, gradients: np.ndarray | None) -> None:
        """Move to the best change, or stop."""
        best = int(np.argmin(values))
        gain = self._value - values[best]
        if np.isfinite(self._value) and not gain > self._options.tolerance * abs(self._value):
            self._done = True
            return
        self._current, self._value = self._asked[best], float(values[best])
        self._done = len(self._neighbours()) == 0

    def close(self) -> None:
        """Hold nothing."""

    def _neighbours(self) -> np.ndarray:
        rows = []
        full = np.count_nonzero(self._current) >= self._options.max_adapters
        allowed = self._options.adapters
        for adapter in range(self._space.num_adapters) if allowed is None else allowed:
            if full and self._current[adapter] == 0:
                continue
            for weight in self._grid:
                if weight != self._current[adapter]:
                    row = self._current.copy()
                    row[adapter] = weight
                    rows.append(row)
        return np.array(rows).reshape(-1, self._space.num_adapters)
