"""Nucleus by hand."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.selectors.top_p import TopP, nucleus

PROBS = torch.tensor([0.125, 0.5, 0.25, 0.125])


def kept(component, shape, seen, probs=PROBS, available=None):
    site = shape(4, available)
    selected = component.build(site)(probs.log(), probs, seen(), site.available_E)
    assert torch.equal(selected.gates > 0, selected.logits > float("-inf"))
    return selected.gates.tolist()


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.01, [0, 0.5, 0, 0]),
        (0.5, [0, 0.5, 0, 0]),  # reached exactly
        (0.6, [0, 0.5, 0.25, 0]),  # the one that reaches it is in
        (0.8, [0.125, 0.5, 0.25, 0]),  # ties by index
        (0.9, [0.125, 0.5, 0.25, 0.125]),
        (1.0, [0.125, 0.5, 0.25, 0.125]),
    ],
)
def test_by_hand(p, expected, shape, seen):
    assert kept(TopP(p=p), shape, seen) == expected


def test_at_least(shape, seen):
    assert kept(TopP(p=0.1, at_least=3), shape, seen) == [0.125, 0.5, 0.25, 0]
    assert kept(TopP(p=0.1, at_least=9), shape, seen) == PROBS.tolist()


def test_missing_experts_are_never_in_the_nucleus(shape, seen):
    probs = torch.tensor([0.5, 0.0, 0.5, 0.0])
    for component in (TopP(p=1.0), TopP(p=0.1, at_least=4)):
        assert kept(component, shape, seen, probs, (True, False, True, False)) == [0.5, 0, 0.5, 0]
    available = torch.tensor([True, False, True, False])
    assert torch.equal(nucleus(probs, available, 1.0, 1), available)
    assert torch.equal(nucleus(probs, available, 0.1, 4), available)


def test_bad_options_are_refused():
    for wrong in ({"p": 0.0}, {"p": 1.1}, {"at_least": 0}):
        with pytest.raises(IncompatibleError, match="got"):
            TopP(**wrong)
