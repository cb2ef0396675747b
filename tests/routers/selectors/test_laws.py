"""Laws of every registered selector."""

import json

import pytest
import torch
from torch.testing import assert_close

from compose.routers.component import describe, from_description
from compose.routers.routing import Routing
from compose.routers.steps import SELECTORS, masked

CASES = [
    *((name, {}) for name in SELECTORS),
    ("top_k", {"k": 1}),
    ("top_k", {"k": 4}),
    ("top_k", {"k": (1, 3)}),
    ("top_k", {"selection_bias": True}),
    ("top_p", {"p": 1.0}),
    ("top_p", {"p": 0.5, "at_least": 3}),
    ("threshold", {"maximum": 0.1}),
    ("entropy_switch", {"threshold": 0.5, "q": 1.0, "at_least": 1}),
    ("entropy_switch", {"threshold": 0.0}),
    ("hard_soft_top_k", {"k": 1}),
]
IDS = [name + "".join(f"-{key}{value}" for key, value in options.items()) for name, options in CASES]
every = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
LEADS = [(), (3,), (2, 5), (2, 0), (0, 5)]
AVAILABLE = [(True,) * 4, (True, False, False, True), (False, True, False, False)]


def scores(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 1.5


def run(module, logits, sight, available_E):
    logits = masked(logits, available_E)
    return module(logits, torch.softmax(logits, -1), sight, available_E)


def dense(selected, experts=4):
    return Routing(
        selected.gates, selected.expert_ids, selected.logits, torch.zeros(*selected.gates.shape[:-1], experts)
    ).dense()


@every
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("available", AVAILABLE)
def test_gates_ids_and_scores_fit_together(name, options, training, lead, available, shape, seen):
    site = shape(4, available)
    module = SELECTORS[name](**options).build(site)
    logits = scores(*lead, 4)
    selected = run(module, logits, seen(*lead, training=training), site.available_E)
    gates, ids = selected.gates, selected.expert_ids
    assert gates.shape[:-1] == lead
    assert selected.logits.shape == gates.shape
    assert gates.dtype == torch.float32
    assert bool((gates >= 0).all())
    assert bool((gates.sum(-1) <= 1 + 1e-6).all())
    assert bool((gates.sum(-1) > 0).all())  # never without an expert
    assert bool((dense(selected)[..., ~site.available_E] == 0).all())
    assert bool(((gates == 0) | (selected.logits > float("-inf"))).all())
    assert all(extra.shape == lead for extra in selected.extras.values())
    if ids is None:
        assert gates.shape[-1] == 4
        assert_close(selected.logits[gates > 0], logits[gates > 0])
    else:
        assert ids.dtype == torch.int64
        assert bool(((ids >= 0) & (ids < 4)).all())
        assert all(len(set(line)) == len(line) for line in ids.reshape(-1, ids.shape[-1]).tolist())
        assert_close(selected.logits, masked(logits, site.available_E).gather(-1, ids))


@every
def test_the_best_expert_always_takes_part(name, options, shape, seen):
    site = shape(4, (True, False, True, True))
    module = SELECTORS[name](**options).build(site)
    logits = scores(200, 4)
    selected = run(module, logits, seen(200), site.available_E)
    best = masked(logits, site.available_E).argmax(-1)
    assert bool((dense(selected).gather(1, best[:, None]) > 0).all())


@every
def test_permuting_experts_permutes(name, options, shape, seen):
    available, order = (True, True, False, True), torch.tensor([3, 2, 0, 1])
    site, moved = shape(4, available), shape(4, [available[int(expert)] for expert in order])
    logits, sight = scores(30, 4), seen(30)
    there = dense(run(SELECTORS[name](**options).build(site), logits, sight, site.available_E))
    here = dense(run(SELECTORS[name](**options).build(moved), logits[:, order], sight, moved.available_E))
    assert_close(here, there[:, order])


@every
def test_decisions_do_not_touch_each_other(name, options, shape, seen):
    site = shape(4)
    module, logits, sight = SELECTORS[name](**options).build(site), scores(4, 6, 4), seen(4, 6)
    whole = dense(run(module, logits, sight, site.available_E))
    part = dense(run(module, logits[1:2, 3:], sight._replace(x=sight.x[1:2, 3:]), site.available_E))
    assert_close(part, whole[1:2, 3:])


@every
def test_a_single_expert_is_always_chosen(name, options, shape, seen):
    site = shape(1)
    selected = run(SELECTORS[name](**options).build(site), scores(5, 1), seen(5), site.available_E)
    assert bool((selected.gates > 0).all())
    if name != "threshold":
        assert_close(selected.gates, torch.ones(5, 1))


@every
def test_ties_go_by_index(name, options, shape, seen):
    site = shape(4)
    chosen = dense(run(SELECTORS[name](**options).build(site), torch.zeros(3, 4), seen(3), site.available_E)) > 0
    count = int(chosen[0].sum())
    assert chosen.tolist() == [[place < count for place in range(4)]] * 3


@every
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_scores_and_parameters(name, options, training, shape, seen):
    site = shape(4, (True, True, False, True))
    module = SELECTORS[name](**options).build(site)
    logits = scores(40, 4).requires_grad_()
    selected = run(module, logits, seen(40, training=training), site.available_E)
    (selected.gates * torch.arange(1.0, 1 + selected.gates.shape[-1])).sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[:, site.available_E] != 0).any())
    assert bool((logits.grad[:, 2] == 0).all())
    for parameter in module.parameters():
        assert bool(parameter.grad.isfinite().all())
        assert bool((parameter.grad != 0).any())


@every
def test_gradients_are_those_of_finite_differences(name, options, shape, seen):
    site = shape(4, (True, True, False, True))
    module = SELECTORS[name](**options).build(site).double()
    sight = seen(6, dtype=torch.float64)

    def of(logits, *_):
        return dense(run(module, logits, sight, site.available_E))

    leaves = [scores(6, 4, dtype=torch.float64).requires_grad_(), *module.parameters()]
    assert torch.autograd.gradcheck(of, leaves)


@every
def test_survives_json(name, options):
    component = SELECTORS[name](**options)
    assert from_description(SELECTORS, json.loads(json.dumps(describe(SELECTORS, component)))) == component
