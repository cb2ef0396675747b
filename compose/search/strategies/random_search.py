"""Random search: half uniform in the box, half sparse with log-uniform magnitudes (Bergstra and Bengio, JMLR 2012)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compose.search.strategy import STRATEGIES

if TYPE_CHECKING:
    from compose.search.space import Space


@STRATEGIES.register("random")
@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Independent draws; a baseline that cannot be misled.

    Attributes:
        population: Candidates per generation. The stream of candidates does not depend on it.
        sparse: Share of draws with few adapters on (1 to 3, log-uniform in [bound/30, bound], random sign).
    """

    population: int = 16
    sparse: float = 0.5

    def __post_init__(self) -> None:
        if self.population < 1 or not 0 <= self.sparse <= 1:
            raise ValueError(f"population must be >= 1 and sparse in [0, 1], got {self.population} and {self.sparse}")

    def start(
        self, space: Space, *, seed: int = 0, evaluations: int = 1000, starts: np.ndarray | None = None
    ) -> RandomState:
        """Begin; ``evaluations`` draws in all, the given ``starts`` first."""
        return RandomState(self, space, seed, evaluations, starts)


class RandomState:
    """Draw number i depends on (seed, i) alone."""

    needs_gradient = False

    def __init__(
        self, options: RandomSearch, space: Space, seed: int, evaluations: int, starts: np.ndarray | None
    ) -> None:
        self._options = options
        self._space = space
        self._seed = seed
        self._asked = 0
        self._limit = evaluations
        self._starts = np.zeros((0, space.dimension)) if starts is None else space.clip(starts)

    @property
    def done(self) -> bool:
        """All draws were asked."""
        return self._asked >= self._limit

    def ask(self) -> np.ndarray:
        """Return the next ``population`` draws."""
        count = min(self._options.population, self._limit - self._asked)
        rows = np.stack([self._draw(self._asked + i) for i in range(count)])
        self._asked += count
        return rows

    def tell(self, weights: np.ndarray, values: np.ndarray, gradients: np.ndarray | None) -> None:
        """Learn nothing."""

    def close(self) -> None:
        """Hold nothing."""

    def _draw(self, number: int) -> np.ndarray:
        if number < len(self._starts):
            return self._starts[number]
        generator = np.random.default_rng([self._seed, number])
        bound, dimension = self._space.bound, self._space.dimension
        if generator.random() >= self._options.sparse:
            return generator.uniform(-bound, bound, dimension)
        weights = np.zeros(dimension)
        chosen = generator.choice(dimension, size=min(dimension, int(generator.integers(1, 4))), replace=False)
        magnitudes = bound * np.exp(generator.uniform(np.log(1 / 30), 0.0, len(chosen)))
        weights[chosen] = magnitudes * generator.choice([-1.0, 1.0], size=len(chosen))
        return weights
