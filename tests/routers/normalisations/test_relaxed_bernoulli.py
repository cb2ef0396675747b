"""Poly's gates: noise in training only, of the right distribution, drawn from torch's state."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.normalisations.relaxed_bernoulli import RelaxedBernoulli


def test_eval_is_the_sigmoid_over_its_sum_without_temperature(shape, seen):
    site = shape(3)
    logits = torch.tensor([[0.0, 1.0, -2.0]])
    active = torch.sigmoid(logits)
    probs = RelaxedBernoulli(temperature=0.1).build(site)(logits, seen(1), site.available_E).probs
    assert_close(probs, active / active.sum())


def test_training_equals_peft_up_to_the_draw(shape, seen):
    site = shape(3)
    logits = torch.tensor([[0.0, 1.0, -2.0]])
    module = RelaxedBernoulli(temperature=0.7).build(site)
    torch.manual_seed(4)
    mine = module(logits, seen(1, training=True), site.available_E).probs
    torch.manual_seed(4)
    drawn = torch.distributions.RelaxedBernoulli(temperature=0.7, logits=logits).rsample()
    assert_close(mine, drawn / drawn.sum(-1, keepdim=True))


def test_the_sample_is_on_with_the_sigmoids_probability(shape, seen):
    site = shape(1)
    logits = torch.full((20000, 1), 0.8)
    normalised = RelaxedBernoulli().build(site)(logits, seen(20000, training=True), site.available_E)
    share = (torch.sigmoid(normalised.scores) > 0.5).float().mean()
    assert_close(share, torch.sigmoid(torch.tensor(0.8)), atol=0.02, rtol=0)  # standard error 0.003


def test_same_state_same_draw_and_none_at_eval(shape, seen):
    site = shape(3)
    module, logits = RelaxedBernoulli().build(site), torch.zeros(4, 3)
    torch.manual_seed(1)
    first = module(logits, seen(4, training=True), site.available_E).probs
    other = module(logits, seen(4, training=True), site.available_E).probs
    torch.manual_seed(1)
    assert_close(module(logits, seen(4, training=True), site.available_E).probs, first, rtol=0, atol=0)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    module(logits, seen(4), site.available_E)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_temperature_is_refused():
    with pytest.raises(IncompatibleError, match="temperature"):
        RelaxedBernoulli(temperature=-1.0)
