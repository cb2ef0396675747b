"""LoRAMoE's localised balance: by hand, against upstream's formula, and where its optimum lies."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.losses.localized import LocalizedCv2

ALL = torch.ones(4, dtype=torch.bool)
ROWS = torch.tensor([0, 0, 0, 1, 1, 1])


def given(decisions, gates, tasks, **more):
    lines = len(gates)
    return decisions(
        torch.zeros(lines, 4), available=ALL, gates_NE=gates, tasks_N=torch.tensor(tasks), rows_N=ROWS[:lines], **more
    )


def upstream(gates_BTE, types_B, delta):
    """``cv_squared`` of LoRAMoE's layer: unbiased variance over squared mean; type 1 prefers the first half."""
    first = (types_B == 1)[:, None].repeat(1, 2)
    second = (types_B == 0)[:, None].repeat(1, 2)
    weighted = gates_BTE.sum(1) * torch.where(torch.cat([first, second], 1), 1 + delta, 1 - delta)
    return weighted.flatten().var() / weighted.flatten().mean() ** 2


def test_equals_upstream_without_padding(decisions, alone):
    gates = torch.softmax(torch.randn(6, 4), 1)
    value = LocalizedCv2(delta=0.2)(given(decisions, gates, [1, 1, 1, 0, 0, 0]), alone)
    assert_close(value, upstream(gates.reshape(2, 3, 4), torch.tensor([1, 0]), 0.2))


def test_by_hand_with_the_papers_denominator(decisions, alone):
    # one row of group 1: mass (3, 1, 1, 1), Z = 1.5 · (3, 1), 0.5 · (1, 1): mean 1.75, squared deviations sum to 10.5
    gates = torch.tensor([[1.0, 0.5, 0.25, 0.25], [1, 0.25, 0.5, 0.25], [1, 0.25, 0.25, 0.5]])
    value = LocalizedCv2(delta=0.5, denominator="mean")(given(decisions, gates, [1, 1, 1]), alone)
    weighted = [4.5, 1.5, 0.5, 0.5]
    variance = sum((entry - 1.75) ** 2 for entry in weighted) / 3
    assert_close(value, torch.tensor(variance / 1.75))


@pytest.mark.parametrize("delta", [0.3, -0.3])
def test_the_optimum_gives_matching_experts_the_smaller_share_for_positive_delta(delta, decisions, alone):
    matching, other = (1 - delta) / 4, (1 + delta) / 4
    gates = torch.tensor([[matching, matching, other, other]] * 3 + [[other, other, matching, matching]] * 3)
    value = LocalizedCv2(delta=delta)(given(decisions, gates, [1, 1, 1, 0, 0, 0]), alone)
    assert_close(value, torch.tensor(0.0), atol=1e-6, rtol=0)


def test_rows_without_a_group_and_padding_do_not_count(decisions, alone):
    gates = torch.softmax(torch.randn(6, 4), 1)
    alone_row = LocalizedCv2()(given(decisions, gates[:3], [1, 1, 1]), alone)
    assert_close(LocalizedCv2()(given(decisions, gates, [1, 1, 1, -1, -1, -1]), alone), alone_row)
    real = torch.tensor([True] * 3 + [False] * 3)
    assert_close(LocalizedCv2()(given(decisions, gates, [1, 1, 1, 0, 0, 0], real_N=real), alone), alone_row)


def test_groups_of_tasks_and_experts(decisions, alone):
    gates = torch.softmax(torch.randn(6, 4), 1)
    expected = LocalizedCv2()(given(decisions, gates, [1, 1, 1, 0, 0, 0]), alone)
    by_task = LocalizedCv2(task_groups=(0, 0, 1))
    assert_close(by_task(given(decisions, gates, [2, 2, 2, 1, 1, 1]), alone), expected)
    moved = LocalizedCv2(expert_groups=(0, 1, 0, 1))(
        given(decisions, gates[:, [2, 0, 3, 1]], [1, 1, 1, 0, 0, 0]), alone
    )
    assert_close(moved, expected)


def test_groups_that_do_not_fit_are_refused(decisions, alone):
    gates = torch.softmax(torch.randn(3, 4), 1)
    with pytest.raises(IncompatibleError, match="3 experts; the bank has 4"):
        LocalizedCv2(expert_groups=(0, 1, 1))(given(decisions, gates, [0, 0, 0]), alone)
    with pytest.raises(IncompatibleError, match="task 2 has none"):
        LocalizedCv2(task_groups=(0, 1))(given(decisions, gates, [2, 2, 2]), alone)
    with pytest.raises(IncompatibleError, match="delta"):
        LocalizedCv2(delta=1.0)
    with pytest.raises(IncompatibleError, match="denominator"):
        LocalizedCv2(denominator="median")
