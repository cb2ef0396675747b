"""L1 of gates and of scores by hand."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.losses.l1_gate import L1Gate

LOGITS = torch.tensor([[1.0, -2, 9, 0.5], [0, 0.25, 9, -0.25]])  # expert 2 is missing


def test_by_hand(decisions, alone):
    gates = torch.tensor([[0.5, -0.25, 0, 0], [0, 0, 0, 1.0]])
    assert_close(L1Gate()(decisions(LOGITS, gates_NE=gates), alone), torch.tensor((0.75 + 1) / 2))
    assert_close(L1Gate(of="logits")(decisions(LOGITS), alone), torch.tensor((3.5 + 0.5) / 2))


def test_normalised_gates_have_the_constant_1(decisions, alone):
    assert_close(L1Gate()(decisions(LOGITS), alone), torch.tensor(1.0))


def test_bad_options_are_refused():
    with pytest.raises(IncompatibleError, match="probs"):
        L1Gate(of="probs")
