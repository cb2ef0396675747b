"""Entropy and load of a step: means over sites, padding left out."""

import math

import pytest
import torch

from compose.routers.routing import Decisions
from compose.routers.train_report import GateSums


def decisions(site, probs, real):
    probs = torch.tensor(probs)
    count = len(probs)
    ones, none = torch.ones(count, dtype=torch.bool), torch.full((count,), -1)
    return Decisions(
        site=site, layer=0, logits_NE=probs.clamp_min(1e-9).log(), probs_NE=probs, gates_NE=probs,
        real_N=torch.tensor(real), response_N=ones, tasks_N=none, labels_N=none,
        available_E=torch.ones(probs.shape[1], dtype=torch.bool),
    )  # fmt: skip


def test_entropy_and_load_are_means_over_sites_of_real_decisions() -> None:
    sums = GateSums()
    even, one, padding = [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]
    sums.add([decisions("a", [even, one, padding], [True, True, False]), decisions("b", [one], [True])])
    sums.add([decisions("a", [even, even], [True, True])])
    entropy, load = sums.finish()
    assert entropy == pytest.approx(math.log(2) * (3 / 4 + 0) / 2)
    assert load == pytest.approx(((4 / 7 + 1) / 2, (3 / 7 + 0) / 2))


def test_without_decisions_there_is_nothing_to_tell() -> None:
    assert GateSums().finish() == (None, ())
    sums = GateSums()
    sums.add([decisions("a", [[1.0, 0.0]], [False])])
    assert sums.finish() == (None, ())
