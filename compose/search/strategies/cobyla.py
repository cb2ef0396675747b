"""COBYLA as LoRAHub runs it: nevergrad's NGOpt resolves to SciPy's COBYLA at 40 evaluations (arXiv:2307.13269).

nevergrad works on z with w = w0 + sigma z, sigma = (upper - lower) / 6, and reflects once at the bounds; COBYLA starts
at z = 0 with radius 1. So evaluation 0 is w0 (0), then adapters are switched on one at a time at +0.5, keeping those
that helped, in the order of the bank. There is no randomness: the seed changes nothing. nevergrad restarts after
convergence from the best point; here the search is done instead.
"""

from __future__ import annotations

import queue
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compose.search.strategy import STRATEGIES

if TYPE_CHECKING:
    from compose.search.space import Space


@STRATEGIES.register("cobyla")
@dataclass(frozen=True, kw_only=True)
class Cobyla:
    """Linear models over a shrinking simplex; one candidate at a time.

    Attributes:
        radius: First step in standardised units; 1 is a third of the bound (0.5 for 1.5).
        tolerance: Last trust radius in standardised units.
    """

    radius: float = 1.0
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.tolerance <= self.radius:
            raise ValueError(f"need 0 < tolerance <= radius, got {self.tolerance} and {self.radius}")

    def start(
        self, space: Space, *, seed: int = 0, evaluations: int = 1000, starts: np.ndarray | None = None
    ) -> CobylaState:
        """Begin at the first start (default 0); ``seed`` is ignored: COBYLA is deterministic."""
        first = np.zeros(space.dimension) if starts is None else space.clip(np.asarray(starts, dtype=np.float64)[0])
        return CobylaState(self, space, evaluations, first)


class CobylaState:
    """SciPy calls back, so it runs in a thread that holds two queues and no reference to this object.

    The thread starts with the first ``ask``. It ends on its own at convergence, and at the latest when this object is
    closed or collected.
    """

    needs_gradient = False

    def __init__(self, options: Cobyla, space: Space, evaluations: int, first: np.ndarray) -> None:
        self._space = space
        self._first = first
        self._questions: queue.SimpleQueue[np.ndarray | BaseException | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        limit = max(evaluations, space.dimension + 2)
        self._thread = threading.Thread(
            target=_minimise,
            args=(self._questions, self._answers, space.dimension, options.radius, options.tolerance, limit),
            name="compose-cobyla",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, self._answers.put, None)
        self._next: np.ndarray | None = None
        self._done = False

    @property
    def done(self) -> bool:
        """Whether COBYLA has converged or the state was closed."""
        return self._done

    def ask(self) -> np.ndarray:
        """Return one candidate, shape ``(1, D)``."""
        if self._next is None:
            self._thread.start()
            self._next = self._receive()
        if self._next is None:
            raise RuntimeError("COBYLA has finished; check `done` before asking")
        return _reflect(self._first + self._space.bound / 3 * self._next, self._space.bound)[None, :]

    def tell(self, weights: np.ndarray, values: np.ndarray, gradients: np.ndarray | None) -> None:
        """Hand the value to COBYLA and wait for its next question."""
        self._answers.put(float(values[0]))
        self._next = self._receive()

    def close(self) -> None:
        """End the thread."""
        self._done = True
        self._finalizer()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _receive(self) -> np.ndarray | None:
        question = self._questions.get()
        if isinstance(question, BaseException):
            raise question
        self._done = question is None
        return question


class _AbandonedError(Exception):
    """Unwinds SciPy's stack when the search is closed."""


def _minimise(
    questions: queue.SimpleQueue[np.ndarray | BaseException | None],
    answers: queue.SimpleQueue[float | None],
    dimension: int,
    radius: float,
    tolerance: float,
    limit: int,
) -> None:
    """Run SciPy's COBYLA in standardised space, asking through the queues; None ends, an exception is handed over."""

    def value(z: np.ndarray) -> float:
        questions.put(np.array(z, dtype=np.float64))
        answer = answers.get()
        if answer is None:
            raise _AbandonedError
        return answer

    try:
        from scipy.optimize import minimize

        options = {"rhobeg": radius, "maxiter": limit}
        minimize(value, np.zeros(dimension), method="COBYLA", tol=tolerance, options=options)
        questions.put(None)
    except _AbandonedError:
        return
    except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread by `ask` or `tell`
        questions.put(error)


def _reflect(weights: np.ndarray, bound: float) -> np.ndarray:
    """Reflect once at the bounds, then clip (nevergrad's "bouncing")."""
    clipped = np.clip(weights, -bound, bound)
    return np.clip(2 * clipped - weights, -bound, bound)
