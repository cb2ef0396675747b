"""Importance: coefficient of variation and MoLE's product, by hand and at their optimum."""

import math

import torch
from torch.testing import assert_close

from compose.routers.losses.importance import ImportanceCv2, MoleBalance

ALL = torch.ones(4, dtype=torch.bool)


def test_cv2_by_hand(decisions, alone):
    # mass (1, 0.5, 0.5): mean 2/3, variance (1/9 + 1/36 + 1/36) / 3
    gates = torch.tensor([[0.5, 0.5, 0, 0.0], [0.5, 0, 0, 0.5]])
    given = decisions(torch.zeros(2, 4), gates_NE=gates)  # expert 2 is missing
    assert_close(ImportanceCv2()(given, alone), torch.tensor((1 / 6 / 3) / (4 / 9)))


def test_cv2_is_0_at_balance_and_one_less_than_experts_at_collapse(decisions, alone):
    gates = torch.eye(4)
    assert ImportanceCv2()(decisions(torch.zeros(4, 4), available=ALL, gates_NE=gates), alone).item() == 0
    gates = torch.eye(4)[[1, 1, 1]]
    assert_close(
        ImportanceCv2()(decisions(torch.zeros(3, 4), available=ALL, gates_NE=gates), alone), torch.tensor(3.0)
    )


def test_cv2_reaches_soft_gates(decisions, alone):
    logits = torch.randn(6, 4).requires_grad_()
    ImportanceCv2()(decisions(logits, k=4, available=ALL), alone).backward()
    assert bool((logits.grad != 0).all())


def test_mole_by_hand_and_at_its_optimum(decisions, alone):
    probs = torch.tensor([[0.5, 0.25, 0, 0.25], [0.7, 0.05, 0, 0.25]])  # mean 0.6, 0.15, 0.25
    assert_close(MoleBalance()(decisions(probs.log()), alone), torch.tensor(-math.log(0.6 * 0.15 * 0.25)))
    assert_close(MoleBalance()(decisions(torch.zeros(3, 4)), alone), torch.tensor(3 * math.log(3)))


def test_mole_stays_finite_for_a_dead_expert(decisions, alone):
    given = decisions(torch.tensor([[300.0, 0.0, 0.0, 0.0]]), available=ALL)
    assert_close(MoleBalance()(given, alone), torch.tensor(-3 * math.log(1e-9)))
