"""The space of coefficients: adapters, layer groups, bounds and penalties, with their exact formulas.

A point is a vector of D = G * N numbers; entry ``g * N + n`` is adapter n in layer group g. Penalties added to the
mean loss:

    l1 / (G N) * sum |w|                                    L1 (LoRAHub's ``0.05 * mean |w|`` is ``l1=0.05, G=1``)
    smoothness / ((G - 1) N) * sum_g |w[g+1] - w[g]|^2      neighbouring layer groups (0 when G = 1)

Both are means, so one scalar per adapter costs the same whether it is written with 1 group or repeated over G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from compose.errors import IncompatibleError


@dataclass(frozen=True, kw_only=True)
class Space:
    """Coefficients of N adapters in G layer groups within ``[-bound, bound]``.

    Attributes:
        num_adapters: N.
        num_groups: G; groups are ordered by depth, 1 means one coefficient per adapter.
        bound: Largest absolute coefficient (1.5 as in LoRAHub).
        l1: Weight of the mean absolute coefficient.
        smoothness: Weight of the mean squared difference of neighbouring groups.
        zero_is_stationary: The gradient at 0 is exactly 0 (``combine="parameters"``), so no descent may start there.
    """

    num_adapters: int
    num_groups: int = 1
    bound: float = 1.5
    l1: float = 0.0
    smoothness: float = 0.0
    zero_is_stationary: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {value}"
            for name, value in (("num_adapters", self.num_adapters), ("num_groups", self.num_groups))
            if value < 1
        ]
        problems += [
            f"{name} must be finite and not negative, got {value}"
            for name, value in (("l1", self.l1), ("smoothness", self.smoothness))
            if not 0 <= value < np.inf
        ]
        if not 0 < self.bound < np.inf:
            problems.append(f"bound must be finite and positive, got {self.bound}")
        if problems:
            raise IncompatibleError("search space: " + "; ".join(problems))

    @property
    def dimension(self) -> int:
        """D = G * N."""
        return self.num_groups * self.num_adapters

    def scalar(self) -> Space:
        """Return the subspace with one coefficient per adapter, equal in all groups."""
        return replace(self, num_groups=1)

    def expand(self, scalars: np.ndarray) -> np.ndarray:
        """Repeat ``(P, N)`` scalars over the groups: ``(P, D)``."""
        return np.tile(scalars, (1, self.num_groups))

    def reduce(self, gradients: np.ndarray) -> np.ndarray:
        """Turn gradients ``(P, D)`` into gradients by the scalars ``(P, N)`` (adjoint of `expand`)."""
        return gradients.reshape(-1, self.num_groups, self.num_adapters).sum(axis=1)

    def clip(self, weights: np.ndarray) -> np.ndarray:
        """Project onto the bounds."""
        return np.clip(weights, -self.bound, self.bound)

    def one_hot(self, adapters: list[int], value: float = 1.0) -> np.ndarray:
        """Return ``(D,)`` with ``value`` (cut to the bound) for the given adapters in every group, 0 elsewhere."""
        weights = np.zeros((self.num_groups, self.num_adapters))
        weights[:, adapters] = min(value, self.bound)
        return weights.reshape(-1)

    def penalty(self, weights: np.ndarray) -> np.ndarray:
        """Return the penalty of each row ``(P, D) -> (P,)``."""
        penalty = self.l1 * np.abs(weights).mean(axis=1)
        if self.smoothness and self.num_groups > 1:
            penalty = penalty + self.smoothness * np.square(self._steps(weights)).mean(axis=(1, 2))
        return penalty

    def penalised_gradient(self, weights: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """Add the penalties to gradients ``(P, D)`` of the mean loss.

        For L1 this is the subgradient of least norm (the pseudo-gradient of OWL-QN, Andrew and Gao 2007): at a
        coefficient of 0 it is 0 unless the loss pulls harder than L1 holds, so an adapter that does not pay stays off.
        """
        total = gradients + self._smoothness_gradient(weights)
        if self.l1 == 0:
            return total
        pull = self.l1 / self.dimension
        held = np.sign(total) * np.maximum(np.abs(total) - pull, 0.0)
        return np.where(weights == 0, held, total + pull * np.sign(weights))

    def _steps(self, weights: np.ndarray) -> np.ndarray:
        return np.diff(weights.reshape(-1, self.num_groups, self.num_adapters), axis=1)

    def _smoothness_gradient(self, weights: np.ndarray) -> np.ndarray:
        if self.smoothness == 0 or self.num_groups == 1:
            return np.zeros_like(weights)
        steps = self._steps(weights)
        gradient = np.zeros((len(weights), self.num_groups, self.num_adapters))
        gradient[:, 1:] += steps
        gradient[:, :-1] -= steps
        scale = 2 * self.smoothness / ((self.num_groups - 1) * self.num_adapters)
        return scale * gradient.reshape(weights.shape)
