"""Calls that do more than a forward are noticed, whenever that begins and ends."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from compose.kernels.watched import Unwatched, runs_again, watched


def _nothing(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_is_noticed_as_long_as_it_is_there(register):
    inner = nn.Linear(2, 2)
    unwatched = Unwatched(nn.Sequential(nn.Identity(), inner))
    assert unwatched()
    hook = getattr(inner, register)(_nothing)
    assert watched(inner)
    assert not unwatched()
    hook.remove()
    assert not watched(inner)
    assert unwatched()


def test_a_hook_on_all_modules_and_another_forward_are_noticed():
    linear, other = nn.Linear(2, 2), nn.Linear(2, 2)
    hook = nn.modules.module.register_module_forward_hook(_nothing)
    assert watched(linear)
    assert not Unwatched(linear)()
    hook.remove()
    assert not watched(linear)
    other.forward = lambda x: x  # type: ignore[method-assign]
    assert watched(other)


def test_hooks_elsewhere_cost_a_look_and_change_nothing():
    linear = nn.Linear(2, 2)
    unwatched = Unwatched(linear)
    assert unwatched()
    nn.Linear(2, 2).register_forward_hook(_nothing)
    torch.zeros(1, requires_grad=True).register_hook(lambda gradient: gradient)
    assert unwatched()


@pytest.mark.parametrize("reentrant", [True, False])
def test_steps_that_run_again_are_told_both_times(reentrant):
    """Reentrant ones run without gradients first: nothing is saved that must be the same."""
    found = []

    def step(x):
        found.append(runs_again())
        return x * x

    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant).sum().backward()
    assert found == [not reentrant] * 2
    assert not runs_again()
    with torch.autograd.graph.save_on_cpu():
        assert not runs_again()
