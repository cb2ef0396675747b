"""Inputs of side networks."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.context import RoutingContext
from compose.routers.side_input import per_decision, side_input
from compose.routers.steps import Seen

SEEN = Seen(torch.ones(2, 5, 3), None, torch.zeros(2, 3), None, RoutingContext(), False)


def test_hidden_states_go_before_text():
    assert side_input(SEEN, 3, "it") is SEEN.x
    assert side_input(SEEN._replace(x=None), 3, "it") is SEEN.text


def test_other_inputs_are_refused():
    with pytest.raises(IncompatibleError, match="it was built for inputs of width 4, the gate reads width 3"):
        side_input(SEEN, 4, "it")
    with pytest.raises(IncompatibleError, match="reads nothing"):
        side_input(SEEN._replace(x=None, text=None), 3, "it")


@pytest.mark.parametrize(("lead", "logits"), [((), (4,)), ((2,), (2, 4)), ((2, 5), (2, 5, 4)), ((2, 5), (2, 5, 3, 4))])
def test_values_per_decision_have_the_leading_shape_of_the_scores(lead, logits):
    assert per_decision(torch.zeros(lead), torch.zeros(logits)).shape == logits[:-1]
