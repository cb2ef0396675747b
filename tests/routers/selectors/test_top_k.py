"""Top-k: counts per layer, ties, and the bias on the selection."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.selectors.top_k import TopK
from compose.routers.steps import masked

PROBS = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def select(component, site, seen, probs=PROBS):
    module = component.build(site)
    logits = masked(probs.log(), site.available_E)
    return module, module(logits, probs, seen(1), site.available_E)


def test_best_first(shape, seen):
    _, selected = select(TopK(k=3), shape(4), seen)
    assert selected.expert_ids.tolist() == [[1, 3, 2]]
    assert_close(selected.gates, torch.tensor([[0.4, 0.3, 0.2]]))


def test_no_more_than_there_are(shape, seen):
    _, selected = select(TopK(k=3), shape(4, (True, False, True, False)), seen)
    assert selected.expert_ids.tolist() == [[2, 0]]


def test_k_of_a_part_of_the_depth(shape):
    ks = [TopK(k=(1, 2, 3, 4)).build(shape(8, layer=layer, num_layers=8)).k for layer in range(8)]
    assert ks == [1, 1, 2, 2, 3, 3, 4, 4]


def test_the_bias_selects_and_does_not_weigh(shape, seen):
    module, before = select(TopK(k=2, selection_bias=True), shape(4), seen)
    assert before.expert_ids.tolist() == [[1, 3]]
    module.selection_bias_E.copy_(torch.tensor([0.35, 0.0, 0.0, -0.25]))
    after = module(PROBS.log(), PROBS, seen(1), torch.ones(4, dtype=torch.bool))
    assert after.expert_ids.tolist() == [[0, 1]]  # 0.45, 0.4, 0.2, 0.05
    assert_close(after.gates, torch.tensor([[0.1, 0.4]]))
    assert "selection_bias_E" in module.state_dict()
    assert "selection_bias_E" not in TopK().build(shape(4)).state_dict()


def test_a_bias_does_not_bring_missing_experts(shape, seen):
    site = shape(4, (True, False, True, True))
    module, _ = select(TopK(k=2, selection_bias=True), site, seen)
    module.selection_bias_E.fill_(-5.0)[1] = 9.0
    ids = module(masked(PROBS.log(), site.available_E), PROBS, seen(1), site.available_E).expert_ids
    assert ids.tolist() == [[3, 2]]


def test_bad_k_is_refused():
    with pytest.raises(IncompatibleError, match="k must"):
        TopK(k=(2, 0))
