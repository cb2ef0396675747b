"""Entropy losses by hand and at their optimum."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.losses.entropies import Entropy, GeneralisedJensenShannon, MutualInformation, Tsallis

CERTAIN = torch.tensor([[60.0, 0, 0, 0], [0, 60, 0, 0], [0, 0, 0, 60]])  # expert 2 is missing
UNIFORM = torch.zeros(3, 4)
MIXED = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0, 0.5]]).log()
LOG2, LOG3 = math.log(2), math.log(3)


def test_entropy(decisions, alone):
    assert_close(Entropy()(decisions(MIXED), alone), torch.tensor((LOG2 + 1.5 * LOG2) / 2))
    assert_close(Entropy()(decisions(CERTAIN), alone), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(Entropy(sign=-1)(decisions(UNIFORM), alone), torch.tensor(-LOG3))


def test_mutual_information(decisions, alone):
    mean = torch.tensor([0.375, 0.375, 0.25])
    expected = 1.25 * LOG2 + (mean * mean.log()).sum()
    assert_close(MutualInformation()(decisions(MIXED), alone), expected)
    assert_close(MutualInformation()(decisions(CERTAIN), alone), torch.tensor(-LOG3))
    assert_close(MutualInformation()(decisions(UNIFORM), alone), torch.tensor(0.0))


def test_gjs(decisions, alone):
    mean = torch.tensor([0.375, 0.375, 0.25])
    divergence = -(mean * mean.log()).sum() - 1.25 * LOG2
    assert_close(GeneralisedJensenShannon()(decisions(MIXED), alone), (LOG3 - divergence) / LOG3)
    assert_close(GeneralisedJensenShannon()(decisions(UNIFORM), alone), torch.tensor(1.0))
    assert_close(GeneralisedJensenShannon()(decisions(CERTAIN), alone), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_gjs_stops_at_its_gammas(decisions, alone):
    loss = GeneralisedJensenShannon(gamma_balance=0.9, gamma_certain=0.7)
    # H(p) are log 2 and 1.5 log 2; 0.7 log 3 lies between; H(mean) is capped by 0.9 log 3
    spread = 0.9 * LOG3 - (0.7 * LOG3 + 1.5 * LOG2) / 2
    assert_close(loss(decisions(MIXED), alone), torch.tensor((0.2 * LOG3 - spread) / LOG3))
    assert_close(loss(decisions(CERTAIN), alone), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_tsallis_is_a_share_of_its_maximum(decisions, alone):
    for q in (0.5, 1.0, 1.1, 2.0):
        assert_close(Tsallis(q=q)(decisions(UNIFORM), alone), torch.tensor(1.0))
        assert_close(Tsallis(q=q)(decisions(CERTAIN), alone), torch.tensor(0.0), atol=1e-5, rtol=0)
    # q = 2: 1 - Σ p²: (1/2, 1 - 3/8) of at most 2/3
    assert_close(Tsallis(q=2.0)(decisions(MIXED), alone), torch.tensor((0.5 + 0.625) / 2 * 1.5))


def test_probabilities_of_exactly_0_pass_finite_gradients(decisions, alone):
    for loss in (Entropy(), MutualInformation(), GeneralisedJensenShannon(), Tsallis(q=0.5), Tsallis()):
        logits = torch.tensor([[0.0, 500, 0, -500]]).requires_grad_()
        loss(decisions(logits), alone).backward()
        assert bool(logits.grad.isfinite().all())


def test_bad_options_are_refused():
    for make in (
        lambda: Entropy(sign=2),
        lambda: Tsallis(q=0.0),
        lambda: GeneralisedJensenShannon(gamma_balance=0.3, gamma_certain=0.3),
    ):
        with pytest.raises(IncompatibleError):
            make()
