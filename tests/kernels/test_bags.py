"""Bags of rank rows."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.bags import bag_lowrank, make_bags
from compose.kernels.stack import LoraStack


def test_every_token_gets_the_rows_of_its_adapters(make_stack):
    bags = make_bags(make_stack((2, 0, 1)), torch.tensor([[2, 0], [-1, 1], [0, 0]]))
    assert bags.rows_N.tolist() == [2, 0, 1, 0, 1, 0, 1]
    assert bags.cells_N.tolist() == [2, 0, 1, 6, 7, 6, 7]
    assert bags.pairs_N.tolist() == [0, 1, 1, 4, 4, 5, 5]
    assert bags.starts_T.tolist() == [0, 3, 3]


def test_equal_ranks_without_gaps_give_bags_of_one_size(make_stack):
    bags = make_bags(make_stack((2, 2)), torch.tensor([[1], [0]]))
    assert bags.rows_N.tolist() == [2, 3, 0, 1]
    assert bags.starts_T.tolist() == [0, 2]


@pytest.mark.parametrize("trained", ["x", "a", "b", "c", "xc", "ab", "xabcy"])
def test_gradients_equal_numerical_ones_for_every_set_of_trained_operands(make_stack, trained):
    ranks = (2, 0, 1)
    bags = make_bags(make_stack(ranks), torch.tensor([[2, 0], [-1, 1], [0, 0]]))
    shapes = {"x": (3, 4), "a": (3, 4), "b": (3, 2), "c": (6,), "y": (3, 2)}
    operands = [torch.randn(size, dtype=torch.float64, requires_grad=n in trained) for n, size in shapes.items()]

    def run(x, a, b, c, base):
        return bag_lowrank(x, LoraStack(a, b, torch.ones(3), ranks), c, base, bags)

    assert torch.autograd.gradcheck(run, operands)
