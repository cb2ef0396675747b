"""Scores as gates."""

import torch

from compose.routers.normalisations.identity import Identity
from compose.routers.steps import masked


def test_signs_and_sizes_stay_and_missing_experts_are_0(shape, seen):
    site = shape(3, (True, False, True))
    logits = masked(torch.tensor([-1.5, 7.0, 0.25]), site.available_E)
    assert Identity().build(site)(logits, seen(), site.available_E).probs.tolist() == [-1.5, 0.0, 0.25]
