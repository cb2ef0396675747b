"""The z-loss by hand and at its optimum."""

import math

import torch
from torch.testing import assert_close

from compose.routers.losses.z_loss import ZLoss


def test_by_hand(decisions, alone):
    logits = torch.tensor([[0.0, 0, 99, 0], [1, 1, -99, 1]])  # expert 2 is missing
    expected = (math.log(3) ** 2 + (1 + math.log(3)) ** 2) / 2
    assert_close(ZLoss()(decisions(logits), alone), torch.tensor(expected))


def test_optimum_is_where_exponentials_sum_to_1(decisions, alone):
    logits = torch.tensor([0.2, 0.3, 1, 0.5]).log().repeat(3, 1)
    assert_close(ZLoss()(decisions(logits), alone), torch.tensor(0.0), atol=1e-12, rtol=0)
