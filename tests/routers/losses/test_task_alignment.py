"""Align-LoRA: discrepancies between tasks by hand, at their optimum, and where they are not defined."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.losses.task_alignment import BANDWIDTHS, KlAlign, MmdAlign

ONE = torch.ones(1, dtype=torch.bool)


def on_a_line(decisions, values, tasks, **more):
    """One expert of rank 1 that passes its input's first entry on."""
    factors = LoraStack(torch.eye(5)[:1], torch.ones(1, 6), torch.ones(1), (1,))
    x = torch.zeros(len(values), 5)
    x[:, 0] = torch.tensor(values)
    given = decisions(torch.zeros(len(values), 1), k=1, available=ONE, stack=factors, x_ND=x)
    return given._replace(tasks_N=torch.tensor(tasks), **more)


def test_mmd_by_hand(decisions, alone):
    # task 0 at 0 and 2, task 1 at 1: exp(-d² / 2) with d = 2 within, 1 between
    given = on_a_line(decisions, [0.0, 1.0, 2.0], [0, 1, 0])
    within = (2 + 2 * math.exp(-2)) / 4
    assert_close(MmdAlign(bandwidths=(1.0,))(given, alone), torch.tensor(within + 1 - 2 * math.exp(-0.5)))
    both = MmdAlign(bandwidths=(1.0, 1.0))(given, alone)
    assert_close(both, torch.tensor(2 * (within + 1 - 2 * math.exp(-0.5))))


def test_mmd_bounds(decisions, alone):
    same = on_a_line(decisions, [1.0, 1, 3, 3], [0, 1, 0, 1])
    assert_close(MmdAlign()(same, alone), torch.tensor(0.0), atol=1e-5, rtol=0)
    far = on_a_line(decisions, [0.0, 1e6], [0, 1])
    assert_close(MmdAlign()(far, alone), torch.tensor(2.0 * len(BANDWIDTHS)))


def test_kl_by_hand(decisions, alone):
    # N(1, 2) and N(4, 8), sample variances
    given = on_a_line(decisions, [0.0, 2.0, 2.0, 6.0], [0, 0, 1, 1])
    forward = 0.5 * (math.log(8 / 2) + 2 / 8 + 9 / 8 - 1)
    backward = 0.5 * (math.log(2 / 8) + 8 / 2 + 9 / 2 - 1)
    assert_close(KlAlign()(given, alone), torch.tensor((forward + backward) / 2))


def test_kl_agrees_with_torch_on_many_rows(decisions, alone):
    given = decisions(torch.randn(20, 4, dtype=torch.float64), available=torch.ones(4, dtype=torch.bool))
    made = given.x_ND @ given.stack.a_RD.T
    left, right = (
        torch.distributions.Normal(part.mean(0), part.std(0))
        for part in (made[given.tasks_N == 0], made[given.tasks_N == 1])
    )
    kl = torch.distributions.kl_divergence
    assert_close(KlAlign()(given, alone), (kl(left, right) + kl(right, left)).sum() / 2)


@pytest.mark.parametrize("loss", [MmdAlign(bandwidths=(1.0, 4.0)), KlAlign()])
def test_three_tasks_are_the_mean_of_their_pairs(loss, decisions, alone):
    values, tasks = [0.0, 1.0, 2.0, 4.0, 5.0, 9.0], [0, 0, 1, 1, 2, 2]
    pairs = []
    for left, right in ((0, 1), (0, 2), (1, 2)):
        mine = [place for place, task in enumerate(tasks) if task in (left, right)]
        pairs.append(loss(on_a_line(decisions, [values[p] for p in mine], [tasks[p] for p in mine]), alone))
    assert_close(loss(on_a_line(decisions, values, tasks), alone), torch.stack(pairs).mean())


@pytest.mark.parametrize("loss", [MmdAlign(), KlAlign()])
def test_one_task_or_none_cost_nothing(loss, decisions, alone):
    for tasks in ([0, 0, 0], [-1, -1, -1], [-1, 0, -1]):
        assert loss(on_a_line(decisions, [0.0, 1.0, 5.0], tasks), alone).item() == 0


def test_kl_leaves_out_tasks_without_a_variance(decisions, alone):
    assert KlAlign()(on_a_line(decisions, [0.0, 1.0, 5.0], [0, 0, 1]), alone).item() == 0


def test_mmd_compares_an_even_sample(decisions, alone):
    values = [float(value) for value in range(16)]
    whole = on_a_line(decisions, values * 2, [0] * 16 + [1] * 16)
    part = on_a_line(decisions, values[::4] * 2, [0] * 4 + [1] * 4)
    loss = MmdAlign(tokens=4)
    shifted = whole._replace(x_ND=whole.x_ND + (whole.tasks_N == 1)[:, None])
    expected = loss(part._replace(x_ND=part.x_ND + (part.tasks_N == 1)[:, None]), alone)
    assert_close(loss(shifted, alone), expected)
    assert expected.item() > 0


def test_bad_options_are_refused():
    for make in (lambda: MmdAlign(bandwidths=()), lambda: MmdAlign(tokens=0), lambda: KlAlign(epsilon=0.0)):
        with pytest.raises(IncompatibleError):
            make()
