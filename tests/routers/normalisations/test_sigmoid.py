"""Sigmoid at a temperature."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.normalisations.sigmoid import Sigmoid


def test_by_hand_and_the_scores_it_hands_on(shape, seen):
    site = shape(2)
    normalised = Sigmoid(temperature=2.0).build(site)(torch.tensor([[0.0, 2.0]]), seen(1), site.available_E)
    assert_close(normalised.probs, torch.tensor([[0.5, 1 / (1 + 2.718281828**-1)]]))
    assert_close(normalised.scores, torch.tensor([[0.0, 1.0]]))


def test_bad_temperature_is_refused():
    with pytest.raises(IncompatibleError, match="temperature"):
        Sigmoid(temperature=0.0)
