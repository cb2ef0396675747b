"""What is minimised: the objective protocol, per-example evaluations, and how broken losses become finite.

Letters: P candidates (rows of a population), S examples (shots), N adapters, G layer groups, D = G * N.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from compose.errors import IncompatibleError

logger = logging.getLogger(__name__)

INVALID_LOSS = 1e6
"""Stands for a loss that is NaN, infinite or larger than this; every real candidate is at most as bad."""


@dataclass(frozen=True)
class Evaluation:
    """One call of an objective.

    Attributes:
        losses: ``(P, S)`` float64, the loss of every candidate on every example (also where the example weight is 0).
        gradients: ``(P, D)`` float64, or None when no gradient was asked for. Row p is the derivative of
            ``sum_s example_weights[p, s] * losses[p, s]`` with respect to candidate p, without penalties.
        cost: Forward-equivalents spent: 1 is one forward of one candidate over all S examples.
            A value with its gradient is about 2 to 3 per candidate; the objective reports what it really spent.
    """

    losses: np.ndarray
    gradients: np.ndarray | None
    cost: float


class Objective(Protocol):
    """Per-example losses of a population of coefficient vectors, as deterministic numbers.

    The result for one candidate must not depend on which others are in the population (to rounding).

    Attributes:
        example_weights: ``(S,)`` non-negative, not all 0: ones weight examples equally, response lengths weight tokens
            equally. Only the proportions matter; the search divides by their sum.
        differentiable: Whether ``gradient=True`` is answered.
    """

    @property
    def example_weights(self) -> np.ndarray:
        """Shape ``(S,)``."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether gradients can be asked for."""
        ...

    def __call__(
        self, weights: np.ndarray, *, gradient: bool = False, example_weights: np.ndarray | None = None
    ) -> Evaluation:
        """Evaluate a population.

        Args:
            weights: ``(P, D)`` float64; entry ``g * N + n`` is the coefficient of adapter n in layer group g.
            gradient: Also return gradients.
            example_weights: ``(P, S)``, non-negative, rows summing to 1: what each row's gradient averages over, so
                every fold of a cross-validation can be a row of one population. None is the objective's own weights,
                normalised. Without ``gradient`` it changes nothing.
        """
        ...


def normalised_example_weights(objective: Objective) -> np.ndarray:
    """Return the objective's example weights ``(S,)`` divided by their sum.

    Raises:
        IncompatibleError: They are empty, negative, not finite, or all 0.
    """
    weights = np.asarray(objective.example_weights, dtype=np.float64)
    if weights.ndim != 1 or weights.size == 0:
        raise IncompatibleError(f"example_weights must have shape (S,) with S >= 1, got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise IncompatibleError(f"example_weights must be finite, non-negative and not all 0, got {weights.tolist()}")
    return weights / weights.sum()


def cleaned(evaluation: Evaluation, shape_PS: tuple[int, int], shape_PD: tuple[int, int]) -> tuple[Evaluation, int]:
    """Replace losses that are not finite or exceed `INVALID_LOSS`, and blank the gradients of such rows with NaN.

    Returns:
        The evaluation with finite losses, and how many rows were broken. A NaN gradient row tells a strategy to step
        back; losses of the row's healthy examples are kept.

    Raises:
        IncompatibleError: The objective returned arrays of other shapes.
    """
    losses = np.array(evaluation.losses, dtype=np.float64)
    if losses.shape != shape_PS:
        raise IncompatibleError(f"the objective returned losses of shape {losses.shape}, expected (P, S) = {shape_PS}")
    broken_PS = ~np.isfinite(losses) | (losses > INVALID_LOSS)
    losses[broken_PS] = INVALID_LOSS
    broken_P = broken_PS.any(axis=1)
    gradients = None
    if evaluation.gradients is not None:
        gradients = np.array(evaluation.gradients, dtype=np.float64)
        if gradients.shape != shape_PD:
            raise IncompatibleError(
                f"the objective returned gradients of shape {gradients.shape}, expected (P, D) = {shape_PD}"
            )
        broken_P |= ~np.isfinite(gradients).all(axis=1)
        gradients[broken_P] = np.nan
    count = int(broken_P.sum())
    if count:
        logger.warning(
            "%d of %d candidates have a loss or gradient that is not finite; such losses count as %g",
            count, shape_PS[0], INVALID_LOSS,
        )  # fmt: skip
    return Evaluation(losses, gradients, float(evaluation.cost)), count
