"""CMA-ES through pycma's ask/tell (Hansen, arXiv:1604.00772), with a private random generator."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compose.search.strategy import STRATEGIES

if TYPE_CHECKING:
    from compose.search.space import Space

logger = logging.getLogger(__name__)

FEWEST_EVALUATIONS = 200


@STRATEGIES.register("cma")
@dataclass(frozen=True, kw_only=True)
class Cma:
    """CMA-ES within the bounds.

    Attributes:
        sigma0: First standard deviation, in units of coefficients.
        population: Candidates per generation; None is pycma's ``4 + floor(3 ln D)``.
    """

    sigma0: float = 0.5
    population: int | None = None

    def __post_init__(self) -> None:
        if not self.sigma0 > 0:
            raise ValueError(f"sigma0 must be positive, got {self.sigma0}")
        if self.population is not None and self.population < 2:
            raise ValueError(f"population must be at least 2, got {self.population}")

    def start(
        self, space: Space, *, seed: int = 0, evaluations: int = 1000, starts: np.ndarray | None = None
    ) -> CmaState:
        """Begin at the first start (default 0); warns when ``evaluations`` is too few for CMA-ES to pay."""
        if evaluations < FEWEST_EVALUATIONS:
            logger.warning(
                "CMA-ES with %d evaluations is usually worse than no search; it needs at least %d "
                "(use 'gradient', or 'cobyla' at small budgets)",
                evaluations, FEWEST_EVALUATIONS,
            )  # fmt: skip
        first = np.zeros(space.dimension) if starts is None else space.clip(np.asarray(starts, dtype=np.float64)[0])
        return CmaState(self, space, seed, first)


class CmaState:
    """pycma has no one-dimensional form, so D = 1 carries an ignored second coordinate."""

    needs_gradient = False

    def __init__(self, options: Cma, space: Space, seed: int, first: np.ndarray) -> None:
        cma = _import_cma()
        generator = np.random.default_rng(seed)
        self._dimension = space.dimension
        settings: dict[str, Any] = {
            "bounds": [-space.bound, space.bound],
            # seed=nan with an own `randn` keeps pycma away from numpy's global generator (and makes seed 0 a seed).
            "seed": math.nan,
            "randn": lambda *shape: generator.standard_normal(shape),
            "signals_filename": "",
            "verbose": -9,
        }
        if options.population is not None:
            settings["popsize"] = options.population
        padded = np.zeros(max(2, space.dimension))
        padded[: space.dimension] = first
        self._engine = cma.CMAEvolutionStrategy(padded, options.sigma0, settings)
        self._asked: list[np.ndarray] = []
        self._space = space

    @property
    def done(self) -> bool:
        """Whether pycma's own termination criteria hold."""
        return bool(self._engine.stop())

    def ask(self) -> np.ndarray:
        """Sample a generation."""
        self._asked = self._engine.ask()
        return self._space.clip(np.stack(self._asked)[:, : self._dimension])

    def tell(self, weights: np.ndarray, values: np.ndarray, gradients: np.ndarray | None) -> None:
        """Update the distribution by the ranks of the values."""
        self._engine.tell(self._asked, values.tolist())

    def close(self) -> None:
        """Hold nothing outside memory."""


def _import_cma() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Could not import matplotlib", category=UserWarning)
        import cma

    return cma
