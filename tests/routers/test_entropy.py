"""Entropies by hand, their limits and their gradients at 0."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.routers.entropy import shannon, tsallis, tsallis_maximum

PROBS = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)


def test_by_hand():
    assert_close(shannon(PROBS).item(), 1.5 * math.log(2))
    assert_close(tsallis(PROBS, 2.0).item(), 1 - 0.375)
    assert_close(tsallis(PROBS, 0.5).item(), (1 - (0.5**0.5 + 1)) / -0.5)
    assert_close(tsallis(PROBS, 1.0), shannon(PROBS))
    assert_close(tsallis(PROBS, 1 + 1e-6), shannon(PROBS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("experts", [1, 2, 7])
def test_the_maximum_is_that_of_equal_probabilities(q, experts):
    equal = torch.full((experts,), 1 / experts, dtype=torch.float64)
    assert_close(tsallis(equal, q).item(), tsallis_maximum(experts, q))


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_gradients_are_finite_at_0(q):
    probs = PROBS.clone().requires_grad_()
    tsallis(probs, q).sum().backward()
    assert bool(probs.grad.isfinite().all())
    assert probs.grad[0, 3].item() == 0
