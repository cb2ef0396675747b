"""Laws of every registered normalisation."""

import json

import pytest
import torch
from torch.testing import assert_close

from compose.routers.component import describe, from_description
from compose.routers.steps import NORMALISATIONS, masked

CASES = [
    *((name, {}) for name in NORMALISATIONS),
    ("softmax", {"temperature": 0.5}),
    ("softmax", {"learned": True}),
    ("sigmoid", {"temperature": 2.0}),
    ("relaxed_bernoulli", {"temperature": 0.3}),
    ("sparsegen", {"fixed": 0.0}),
    ("sparsegen", {"shared": False, "hidden": 3}),
]
IDS = [name + "".join(f"-{key}" for key in options) for name, options in CASES]
every = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
SUMS_TO_1 = {"softmax", "relaxed_bernoulli", "sparsegen"}
NON_NEGATIVE = SUMS_TO_1 | {"sigmoid", "relu"}
LEADS = [(), (3,), (2, 5), (2, 0), (0, 5)]


def scores(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@every
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("available", [(True,) * 4, (True, False, False, True), (False, True, False, False)])
def test_shapes_signs_and_sums(name, options, training, lead, available, shape, seen):
    site = shape(4, available)
    module = NORMALISATIONS[name](**options).build(site)
    normalised = module(masked(scores(*lead, 4), site.available_E), seen(*lead, training=training), site.available_E)
    probs = normalised.probs
    assert probs.shape == (*lead, 4)
    assert probs.dtype == torch.float32
    assert bool(probs.isfinite().all())
    assert bool((probs[..., ~site.available_E] == 0).all())
    assert all(extra.shape == lead for extra in normalised.extras.values())
    assert normalised.scores is None or normalised.scores.shape == probs.shape
    if name in NON_NEGATIVE:
        assert bool((probs >= 0).all())
    if name in SUMS_TO_1:
        assert_close(probs.sum(-1), torch.ones(lead))


@every
def test_permuting_experts_permutes(name, options, shape, seen):
    site = shape(4, (True, True, False, True))
    module = NORMALISATIONS[name](**options).build(site)
    order = torch.tensor([3, 2, 0, 1])
    logits = masked(scores(2, 5, 4), site.available_E)
    there = module(logits, seen(2, 5), site.available_E).probs
    assert_close(module(logits[..., order], seen(2, 5), site.available_E[order]).probs, there[..., order])


@every
def test_decisions_do_not_touch_each_other(name, options, shape, seen):
    site = shape(4)
    module = NORMALISATIONS[name](**options).build(site)
    logits, sight = scores(2, 5, 4), seen(2, 5)
    whole = module(logits, sight, site.available_E).probs
    part = module(logits[:1, 2:], sight._replace(x=sight.x[:1, 2:]), site.available_E).probs
    assert_close(part, whole[:1, 2:])


@every
def test_a_single_expert(name, options, shape, seen):
    site = shape(1)
    probs = NORMALISATIONS[name](**options).build(site)(scores(3, 1), seen(3), site.available_E).probs
    if name in SUMS_TO_1:
        assert_close(probs, torch.ones(3, 1))


@every
@pytest.mark.parametrize("available", [(True,) * 4, (True, False, True, True)])
def test_gradients_reach_scores_and_parameters(name, options, available, shape, seen):
    site = shape(4, available)
    module = NORMALISATIONS[name](**options).build(site)
    logits = scores(6, 4).requires_grad_()
    probs = module(masked(logits, site.available_E), seen(6), site.available_E).probs
    (probs * torch.arange(1.0, 5)).sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad != 0).any(0)[site.available_E].all())
    assert bool((logits.grad[:, ~site.available_E] == 0).all())
    for parameter in module.parameters():
        assert bool(parameter.grad.isfinite().all())


@every
def test_gradients_are_those_of_finite_differences(name, options, shape, seen):
    site = shape(4, (True, True, False, True))
    module = NORMALISATIONS[name](**options).build(site).double()
    sight = seen(5, dtype=torch.float64)

    def of(logits, *_):
        return module(masked(logits, site.available_E), sight, site.available_E).probs

    leaves = [scores(5, 4, dtype=torch.float64).requires_grad_(), *module.parameters()]
    assert torch.autograd.gradcheck(of, leaves)


@every
def test_large_scores_stay_finite(name, options, shape, seen):
    site = shape(4)
    module = NORMALISATIONS[name](**options).build(site)
    logits = torch.tensor([[1e6, -1e6, 0, 1e6], [-1e6, -1e6, -1e6, -1e6]]).requires_grad_()
    probs = module(logits, seen(2), site.available_E).probs
    probs.sum().backward()
    assert bool(probs.isfinite().all())
    assert bool(logits.grad.isfinite().all())


@every
def test_survives_json(name, options):
    component = NORMALISATIONS[name](**options)
    assert from_description(NORMALISATIONS, json.loads(json.dumps(describe(NORMALISATIONS, component)))) == component
