"""Supervised gates: by hand, per token and per sequence."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.losses.gate_ce import GateCrossEntropy

PROBS = torch.tensor([[0.5, 0.25, 0, 0.25], [0.1, 0.2, 0, 0.7], [0.4, 0.4, 0, 0.2], [0.3, 0.3, 0, 0.4]])


def given(decisions, labels, rows=(0, 0, 0, 1)):
    return decisions(PROBS.log(), labels_N=torch.tensor(labels), rows_N=torch.tensor(rows))


def test_tokens_count_equally(decisions, alone):
    value = GateCrossEntropy()(given(decisions, [0, 3, -1, 1]), alone)
    assert_close(value, torch.tensor(-(math.log(0.5) + math.log(0.7) + math.log(0.3)) / 3))


def test_sequences_count_equally(decisions, alone):
    value = GateCrossEntropy(level="sequence")(given(decisions, [0, 3, -1, 1]), alone)
    assert_close(value, torch.tensor(-((math.log(0.5) + math.log(0.7)) / 2 + math.log(0.3)) / 2))


def test_agrees_with_torch_and_ignores_missing_experts(decisions, alone):
    labels = [0, 3, 2, 1]  # expert 2 is missing
    expected = torch.nn.functional.cross_entropy(
        PROBS.log().masked_fill(PROBS == 0, -1e9), torch.tensor([0, 3, -100, 1]), ignore_index=-100
    )
    assert_close(GateCrossEntropy()(given(decisions, labels), alone), expected)


def test_uniform_scores_cost_the_logarithm_of_the_experts(decisions, alone):
    value = GateCrossEntropy()(decisions(torch.zeros(3, 4), labels_N=torch.tensor([0, 1, 3])), alone)
    assert_close(value, torch.tensor(math.log(3)))


def test_labels_beyond_the_experts_are_refused(decisions, alone):
    with pytest.raises(IncompatibleError, match="label 4"):
        GateCrossEntropy()(given(decisions, [0, 4, 1, 1]), alone)
    with pytest.raises(IncompatibleError, match="level"):
        GateCrossEntropy(level="batch")
