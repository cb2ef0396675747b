"""Softmax at a fixed and at a learned temperature."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.normalisations.softmax import Softmax
from compose.routers.steps import masked


@pytest.mark.parametrize("learned", [False, True])
def test_temperature_and_the_scores_it_hands_on(learned, shape, seen):
    site = shape(3, (True, False, True))
    logits = masked(torch.tensor([[1.0, 9.0, 2.0]]), site.available_E)
    normalised = Softmax(temperature=0.5, learned=learned).build(site)(logits, seen(1), site.available_E)
    assert_close(normalised.probs[:, [0, 2]], torch.softmax(torch.tensor([[2.0, 4.0]]), -1))
    assert_close(normalised.scores, torch.tensor([[2.0, float("-inf"), 4.0]]))


def test_a_learned_temperature_has_a_finite_gradient_where_experts_are_missing(shape, seen):
    site = shape(3, (True, False, True))
    module = Softmax(learned=True).build(site)
    module(masked(torch.tensor([[1.0, 9.0, 2.0]]), site.available_E), seen(1), site.available_E).probs[0, 0].backward()
    share = torch.softmax(torch.tensor([1.0, 2.0]), 0)
    assert_close(module.log_temperature.grad, share[0] * share[1] * (2.0 - 1.0))


def test_bad_temperature_is_refused():
    with pytest.raises(IncompatibleError, match="temperature"):
        Softmax(temperature=0.0)
