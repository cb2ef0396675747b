"""AdaMoLE's threshold: upstream's formula, its bound, and decisions that would lose every expert."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.selectors.threshold import Threshold, keep_above

ALL = torch.ones(4, dtype=torch.bool)


def test_equals_upstream(shape, seen):
    site, sight, logits = shape(4), seen(50), torch.randn(50, 4)
    module, probs = Threshold().build(site), torch.softmax(logits, -1)
    selected = module(logits, probs, sight, site.available_E)
    threshold = torch.sigmoid(sight.x @ module.weight_D + module.bias) / 4
    above = probs - threshold[:, None]
    assert_close(selected.extras["threshold"], threshold)
    assert_close(selected.gates, above * (above >= 0))
    assert 1 < float((selected.gates > 0).sum(1).float().mean()) < 4


def test_the_bound_is_one_over_available_experts(shape, seen):
    site = shape(4, (True, False, True, False))
    module = Threshold().build(site)
    assert module.maximum == 0.5
    with pytest.raises(IncompatibleError, match=r"1 / E = 0\.25"):
        Threshold(maximum=0.3).build(shape(4))
    with pytest.raises(IncompatibleError, match="maximum"):
        Threshold(maximum=0.0)


def test_initial_values_are_those_of_a_linear_layer(shape):
    module = Threshold().build(shape(4, in_features=400))
    bound = 1 / 400**0.5
    assert bool((module.weight_D.abs() <= bound).all())
    assert module.weight_D.abs().max().item() > 0.9 * bound
    assert abs(module.bias.item()) <= bound


def test_a_decision_that_rounds_to_nothing_keeps_its_best(shape):
    probs = torch.full((2, 4), 0.25)
    selected = keep_above(torch.zeros(2, 4), probs, torch.tensor([0.25, 0.3]), ALL)
    assert selected.gates.tolist() == [[0.25, 0, 0, 0]] * 2
    assert (selected.logits == 0).tolist() == [[True, False, False, False]] * 2


def test_probabilities_that_do_not_sum_to_1_keep_their_best(shape):
    probs = torch.tensor([[0.01, 0.03, 0.02, 0.0]])
    assert_close(keep_above(probs.log(), probs, torch.tensor([0.1]), ALL).gates, torch.tensor([[0, 0.03, 0, 0]]))


def test_a_saturated_threshold_leaves_experts(shape, seen):
    site = shape(4)
    module = Threshold().build(site)
    with torch.no_grad():
        module.bias.fill_(1e4)
    selected = module(torch.zeros(3, 4), torch.full((3, 4), 0.25), seen(3), site.available_E)
    assert bool((selected.gates.sum(1) > 0).all())


def test_gates_without_an_input_are_refused(shape, seen):
    with pytest.raises(IncompatibleError, match="reads no vectors"):
        Threshold().build(shape(4, in_features=0))
    site = shape(4)
    with pytest.raises(IncompatibleError, match="reads nothing"):
        Threshold().build(site)(torch.zeros(2, 4), torch.full((2, 4), 0.25), seen(2)._replace(x=None), ALL)
