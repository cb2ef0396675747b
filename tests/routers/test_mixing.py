"""Gates of one target: what experts without factors there would have had goes to the others."""

import pytest
import torch

from compose.kernels.stack import LoraStack
from compose.routers.mixing import Mixer
from compose.routers.routing import Routing
from compose.routers.spec import MixtureSpec


def stack_of(*ranks: int) -> LoraStack:
    rows = sum(ranks)
    return LoraStack(torch.zeros(rows, 4), torch.zeros(rows, 5), torch.ones(len(ranks)), ranks)


def fitted(gates, ranks, ids=None, **options):
    spec = MixtureSpec(**options)
    gates = torch.tensor(gates)
    wide = torch.zeros(*gates.shape[:-1], len(ranks))
    return Mixer(spec).fitted(Routing(gates, ids, wide, wide), stack_of(*ranks))[0]


def test_the_rest_takes_over_the_share_of_a_missing_expert() -> None:
    torch.testing.assert_close(fitted([0.5, 0.3, 0.2], (2, 0, 1)), torch.tensor([0.5, 0.0, 0.2]) / 0.7)
    chosen = fitted([[0.6, 0.2]], (2, 0, 1), ids=torch.tensor([[1, 2]]))
    torch.testing.assert_close(chosen, torch.tensor([[0.0, 0.8]]))


def test_missing_zero_and_complete_targets_keep_the_gates() -> None:
    assert fitted([0.5, 0.3, 0.2], (2, 0, 1), missing="zero").tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert fitted([0.5, 0.3, 0.2], (2, 1, 1)).tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_gates_of_all_missing_experts_are_nothing() -> None:
    assert fitted([1.0, 0.0], (0, 2)).tolist() == [0.0, 0.0]


def test_gates_of_both_signs_stay_bounded() -> None:
    """A softmax that is sure of the missing expert leaves small biases, whose sum says nothing of their size."""
    gates = fitted([0.98, 0.0100001, -0.01], (0, 2, 2))
    torch.testing.assert_close(gates, torch.tensor([0.0, 0.5, -0.5]), rtol=1e-4, atol=1e-4)
    assert float(gates.abs().sum()) == pytest.approx(1.0000001, abs=1e-6)
