"""A synthetic objective with known minimum: mean over S examples of 0.5 |X_s (w - t_s)|^2 + floor."""

from __future__ import annotations

import numpy as np
import pytest

from compose.search.objective import Evaluation


class Quadratic:
    """Convex in w; ``t_s = target + noise``: the noise is how far examples disagree."""

    def __init__(self, target, num_examples=4, noise=0.0, seed=0, identity=False, differentiable=True):
        generator = np.random.default_rng(seed)
        self.target = np.asarray(target, dtype=np.float64)
        dimension = len(self.target)
        self.targets = self.target + noise * generator.standard_normal((num_examples, dimension))
        self.maps = generator.standard_normal((num_examples, 3, dimension)) * 2 / np.sqrt(dimension)
        if identity:
            self.maps = np.broadcast_to(np.eye(dimension), (num_examples, dimension, dimension))
        self.example_weights = np.ones(num_examples)
        self.differentiable = differentiable
        self.calls = []

    def __call__(self, weights, *, gradient=False, example_weights=None):
        self.calls.append((weights.copy(), gradient, None if example_weights is None else example_weights.copy()))
        # One candidate at a time, so that a row's result cannot depend on its neighbours even in rounding.
        residuals = [
            np.stack([m @ (row - t) for m, t in zip(self.maps, self.targets, strict=True)]) for row in weights
        ]
        losses = np.stack([0.5 * np.square(r).sum(axis=1) + 0.1 for r in residuals])
        gradients = None
        if gradient:
            gradients = np.stack(
                [
                    sum(e * (m.T @ r) for e, m, r in zip(row_weights, self.maps, residual, strict=True))
                    for row_weights, residual in zip(example_weights, residuals, strict=True)
                ]
            )
        return Evaluation(losses, gradients, len(weights) * (2.5 if gradient else 1.0))


class Noisy:
    """Every example has its own random slope, so what helps one says nothing about another."""

    differentiable = True

    def __init__(self, dimension, num_examples, seed):
        generator = np.random.default_rng(seed)
        self.slopes = generator.standard_normal((num_examples, dimension))
        self.curvature = 1.0
        self.example_weights = np.ones(num_examples)

    def __call__(self, weights, *, gradient=False, example_weights=None):
        losses = 3.0 + weights @ self.slopes.T + 0.5 * self.curvature * np.square(weights).sum(axis=1)[:, None]
        gradients = example_weights @ self.slopes + self.curvature * weights if gradient else None
        return Evaluation(losses, gradients, len(weights) * (2.5 if gradient else 1.0))


@pytest.fixture
def quadratic():
    return Quadratic


@pytest.fixture
def noisy():
    return Noisy
