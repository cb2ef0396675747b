"""Positive parts."""

import torch

from compose.routers.normalisations.relu import Relu


def test_all_experts_may_be_0(shape, seen):
    site = shape(3)
    probs = Relu().build(site)(torch.tensor([[-1.0, 2.0, 0.5], [-1, -2, -3]]), seen(2), site.available_E).probs
    assert probs.tolist() == [[0.0, 2.0, 0.5], [0.0, 0.0, 0.0]]
