"""The one protocol of all search strategies: options that start a state, and a state that asks and is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from compose.registry import Registry

if TYPE_CHECKING:
    import numpy as np

    from compose.search.space import Space


class StrategyState(Protocol):
    """A search under way. ``ask`` and ``tell`` alternate; equal seeds and equal answers give equal questions.

    Attributes:
        needs_gradient: Whether ``tell`` must be given gradients.
        done: Nothing more to ask.
    """

    needs_gradient: bool

    @property
    def done(self) -> bool:
        """Whether there is nothing more to ask."""
        ...

    def ask(self) -> np.ndarray:
        """Return the next candidates ``(P, D)`` float64, P >= 1, within the bounds. P may change between calls."""
        ...

    def tell(self, weights: np.ndarray, values: np.ndarray, gradients: np.ndarray | None) -> None:
        """Take the answers for exactly the rows of the last ``ask``.

        Args:
            weights: ``(P, D)``, as asked.
            values: ``(P,)`` finite penalised values.
            gradients: ``(P, D)`` of the penalised value, a row of NaN where it could not be computed; None when
                `needs_gradient` is False.
        """
        ...

    def close(self) -> None:
        """Free threads and the like; the state may be abandoned at any time, closing twice is harmless."""
        ...


class Strategy(Protocol):
    """A frozen dataclass whose fields are the hyperparameters of a search."""

    def start(
        self, space: Space, *, seed: int = 0, evaluations: int = 1000, starts: np.ndarray | None = None
    ) -> StrategyState:
        """Begin a search.

        Args:
            space: Dimension, bounds and penalties.
            seed: Seeds private generators only.
            evaluations: About how many candidates can be afforded; the caller enforces the budget.
            starts: ``(M, D)`` points to begin from; strategies with one start take the first. None: their default.
        """
        ...


STRATEGIES: Registry[type[Strategy]] = Registry("search strategy", "compose.search.strategies")
