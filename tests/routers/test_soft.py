"""The fast decision of linear scores, softmax and top k equals the steps it stands for, gradients and all."""

from __future__ import annotations

import pytest
import torch

from compose.routers.gates.linear import LinearGate
from compose.routers.normalisations.sigmoid import Sigmoid
from compose.routers.normalisations.softmax import Softmax
from compose.routers.router import SiteRouter
from compose.routers.selectors.top_k import TopK, best
from compose.routers.soft import _FEW, SoftGates, _best
from compose.routers.spec import MixtureSpec

SOFT = {
    "all": {},
    "temperature and bias": {
        "normalise": Softmax(temperature=0.3),
        "gate": LinearGate(init="normal", std=1, bias=True),
    },
    "top 2": {"select": TopK(k=2)},
    "top 2, sum": {"select": TopK(k=2), "renormalise": "sum"},
    "top 2, softmax, temperature": {
        "select": TopK(k=2),
        "renormalise": "softmax",
        "normalise": Softmax(temperature=2),
    },
    "top 1, sum": {"select": TopK(k=1), "renormalise": "sum"},
    "ties": {"select": TopK(k=3), "gate": LinearGate(init="zeros")},
}
MORE = {
    "layer norm": {"gate": LinearGate(layer_norm=True)},
    "learned temperature": {"normalise": Softmax(learned=True)},
    "another normalisation": {"normalise": Sigmoid()},
    "selection bias": {"select": TopK(k=2, selection_bias=True)},
    "double softmax": {"select": TopK(k=2), "renormalise": "softmax_probs"},
    "all renormalised": {"renormalise": "sum"},
    "bias after selection": {"post": "bias"},
    "power": {"gate_power": 2},
    "scale": {"global_scale": 0.5},
    "always on": {"always_on": ("expert-1",)},
    "noise": {"noise": 0.1},
    "expert dropout": {"expert_dropout": 0.1},
    "capacity": {"capacity": 1.0},
}


def _site(shape, options) -> SiteRouter:
    return SiteRouter(MixtureSpec(**{"gate": LinearGate(init="normal", std=1.0), **options}), shape(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(2, 3), (5,)], ids=str)
@pytest.mark.parametrize("which", SOFT)
def test_it_equals_the_steps(which, lead, dtype, shape, seen):
    site, sight = _site(shape, SOFT[which]), seen(*lead, dtype=dtype)
    x = sight.x.requires_grad_(True)
    quick, slow = site.quick(x), site(sight._replace(x=x))
    assert quick is not None
    assert (quick.expert_ids is None) == (slow.expert_ids is None)
    if quick.expert_ids is not None:
        torch.testing.assert_close(quick.expert_ids, slow.expert_ids)
    for name in ("gates", "logits", "probs"):
        one, other = getattr(quick, name), getattr(slow, name)
        torch.testing.assert_close(one, other)
        weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
        inputs = (x, *site.gate.parameters())
        gradients = [torch.autograd.grad((each * weights).sum(), inputs, retain_graph=True) for each in (one, other)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("which", MORE)
def test_it_steps_aside_where_there_is_more_to_a_decision(which, shape, seen):
    assert _site(shape, MORE[which]).quick(seen(2, 3).x) is None


def test_it_steps_aside_where_an_expert_is_missing_or_the_gate_was_replaced(shape, seen):
    x = seen(2, 3).x
    site = SiteRouter(MixtureSpec(), shape(4, [True, False, True, True]))
    assert site.quick(x) is None
    site = _site(shape, {})
    site.gate = torch.nn.Identity()
    assert site.quick(x) is None


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("levels", [None, 4, 1], ids=["all different", "ties", "all equal"])
def test_many_scores_are_ranked_as_few(k, levels):
    generator = torch.Generator().manual_seed(k)
    order = torch.rand(7, 40, 12, generator=generator)
    if levels is not None:
        order = (order * levels).floor()
    order[0, 0] = float("-inf")
    want = torch.stack([best(row, k) for row in order.flatten(0, 1)]).view(7, 40, k)
    torch.testing.assert_close(_best(order, k), want)


@pytest.mark.parametrize("rows", [4, 16, 17, 600], ids=str)  # 16 rows of 8 are a few, 600 are many
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("levels", [None, 4, 1], ids=["all different", "ties", "all equal"])
@pytest.mark.parametrize("endless", [False, True])  # with a score of -inf none are ranked in Python
def test_dense_gates_are_those_of_the_chosen(endless, levels, k, to_one, rows):
    scores = torch.randn(rows, 8, generator=torch.Generator().manual_seed(k)) * 3
    if levels is not None:
        scores = scores.clamp(-2, 2).mul(levels / 4).round()
    if endless:
        scores[0, 0] = float("-inf")
    soft = SoftGates(0.7, TopK(k=k), to_one)
    chosen = soft.decide(torch.eye(8), None, scores.clamp_min(-1e30))
    want = torch.zeros(rows, 8).scatter_(-1, chosen.expert_ids, chosen.gates)
    torch.testing.assert_close(soft.dense(scores.clone()), want)


def test_a_few_scores_are_ranked_in_python_and_those_that_are_no_numbers_are_not(monkeypatch):
    asked = []
    monkeypatch.setattr("compose.routers.soft._others", lambda scores, k: asked.append(1) or scores < 0)
    soft = SoftGates(1.0, TopK(k=2), to_one=True)
    soft.dense(torch.randn(_FEW // 8, 8))
    assert not asked
    soft.dense(torch.randn(_FEW // 8 + 1, 8))
    assert len(asked) == 1
    for odd in (float("nan"), float("inf")):
        scores = torch.randn(2, 8)
        scores[1, 3] = odd
        soft.dense(scores)
    assert len(asked) == 3
