"""The straight-through reading: values of top-k, gradients of the soft mixture."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.selectors.hard_soft_top_k import HardSoftTopK
from compose.routers.selectors.top_k import TopK


def test_values_are_top_k_and_gradients_soft(shape, seen):
    site, weights = shape(4), torch.randn(6, 4)
    logits = torch.randn(6, 4).requires_grad_()
    probs = torch.softmax(logits, -1)
    selected = HardSoftTopK(k=2).build(site)(logits, probs, seen(6, training=True), site.available_E)
    top = TopK(k=2).build(site)(logits, probs, seen(6), site.available_E)
    assert selected.expert_ids is None
    assert_close(selected.gates, torch.zeros(6, 4).scatter(1, top.expert_ids, top.gates), rtol=0, atol=0)
    (mine,) = torch.autograd.grad((selected.gates * weights).sum(), logits, retain_graph=True)
    (soft,) = torch.autograd.grad((probs * weights).sum(), logits)
    assert_close(mine, soft)


def test_eval_is_top_k(shape, seen):
    site, logits = shape(4), torch.randn(6, 4)
    probs = torch.softmax(logits, -1)
    mine, top = (part(k=2).build(site)(logits, probs, seen(6), site.available_E) for part in (HardSoftTopK, TopK))
    assert_close(mine, top)


def test_bad_k_is_refused():
    with pytest.raises(IncompatibleError, match="k must"):
        HardSoftTopK(k=0)
