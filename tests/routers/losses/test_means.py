"""Masked means over processes."""

import torch
from torch.testing import assert_close

from compose.routers.losses.means import world_mean


def test_mean_ignores_lines_without_weight_whatever_they_hold():
    values = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")], [3.0, 6.0]]).requires_grad_()
    mean, total = world_mean(values, torch.tensor([True, False, True]), lambda counts: counts)
    assert_close(mean, torch.tensor([2.0, 4.0]))
    assert total.item() == 2
    mean.sum().backward()
    assert_close(values.grad, torch.tensor([[0.5, 0.5], [0, 0], [0.5, 0.5]]))


def test_weights_may_be_fractions():
    mean, total = world_mean(torch.tensor([[1.0], [4.0]]), torch.tensor([0.5, 0.25]), lambda counts: counts)
    assert_close(mean, torch.tensor([2.0]))
    assert total.item() == 0.75


def test_nothing_counted_is_0_with_a_graph():
    values = torch.ones(2, 3).requires_grad_()
    mean, total = world_mean(values, torch.zeros(2, dtype=torch.bool), lambda counts: counts)
    mean.sum().backward()
    assert total.item() == 0
    assert_close(mean.detach(), torch.zeros(3))
    assert_close(values.grad, torch.zeros(2, 3))


def test_the_value_is_the_worlds_and_the_gradient_this_processes_part():
    values = torch.tensor([[1.0], [2.0]]).requires_grad_()
    other = torch.tensor([9.0, 1.0, 1.0])  # another process with one line of value 9
    mean, total = world_mean(values, torch.ones(2), lambda counts: counts + other)
    mean.sum().backward()
    assert_close(mean.detach(), torch.tensor([4.0]))
    assert total.item() == 3
    assert_close(values.grad, torch.full((2, 1), 2 / 3))  # two processes: averaged, 1 / 3
