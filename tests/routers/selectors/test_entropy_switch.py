"""DynMoLE's switch by hand."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.selectors.entropy_switch import EntropySwitch

# q = 2 on three experts: 1 - Σ p² of at most 2/3: 0.9375, 0.42
PROBS = torch.tensor([[0.5, 0.25, 0.25], [0.84, 0.08, 0.08]])


def kept(component, shape, seen, probs=PROBS, available=None):
    site = shape(probs.shape[1], available)
    selected = component.build(site)(probs.log(), probs, seen(len(probs)), site.available_E)
    return (selected.gates > 0).tolist()


def test_undecided_takes_all_and_decided_a_nucleus(shape, seen):
    component = EntropySwitch(threshold=0.6, q=2.0, p=0.4, at_least=1)
    assert kept(component, shape, seen) == [[True, True, True], [True, False, False]]
    component = EntropySwitch(threshold=0.94, q=2.0, p=0.4, at_least=1)
    assert kept(component, shape, seen) == [[True, False, False], [True, False, False]]
    component = EntropySwitch(threshold=0.4, q=2.0, p=0.4, at_least=1)
    assert kept(component, shape, seen) == [[True, True, True], [True, True, True]]


def test_the_share_is_of_what_the_sites_experts_allow(shape, seen):
    probs = torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    component = EntropySwitch(threshold=0.99, q=2.0, p=0.4, at_least=1)
    assert kept(component, shape, seen, probs, (True, False, True, False)) == [[True, False, True, False]]
    assert kept(component, shape, seen, probs) == [[True, False, False, False]]


def test_bad_options_are_refused():
    for wrong in ({"threshold": 1.0}, {"q": 0.0}, {"p": 0.0}, {"at_least": 0}):
        with pytest.raises(IncompatibleError, match="got"):
            EntropySwitch(**wrong)
