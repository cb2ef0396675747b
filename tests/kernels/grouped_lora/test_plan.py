from __future__ import annotations

import pytest
import torch

from compose.errors import IncompatibleError
from compose.kernels.grouped_lora.plan import plan_groups


def test_entries_are_grouped_by_adapter_in_their_first_order():
    plan = plan_groups(torch.tensor([4, 2, -1, 4, 2, 4]))
    assert plan.distinct == (2, 4)
    assert plan.bounds == (1, 3, 6)
    assert plan.order.tolist() == [2, 1, 4, 0, 3, 5]
    assert plan.order[plan.inverse].tolist() == [0, 1, 2, 3, 4, 5]
    assert (plan.lowest, plan.highest, plan.single) == (-1, 4, None)


@pytest.mark.parametrize(
    ("ids", "single"), [([3, 3], 3), ([-1, -1], -1), ([], -1), ([3, -1], None), ([0, 1], None)], ids=str
)
def test_a_single_adapter_is_recognised(ids, single):
    assert plan_groups(torch.tensor(ids, dtype=torch.int64)).single == single


def test_ids_per_token_are_flattened():
    plan = plan_groups(torch.tensor([[1, 0], [0, 1]]))
    assert plan.order.tolist() == [1, 2, 0, 3]
    assert plan.bounds == (0, 2, 4)


def test_later_changes_to_ids_do_not_reach_the_plan():
    ids = torch.tensor([1, 0])
    plan = plan_groups(ids)
    ids.fill_(7)
    assert plan.ids.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([0, -2]), "id -2 is out of range"),
        (torch.tensor([0, 1], dtype=torch.int32), "int64"),
        (torch.tensor(0), r"\(B,\) or \(B, T\)"),
        (torch.tensor([0.0]), "int64"),
    ],
    ids=["below -1", "int32", "no dimension", "floating point"],
)
def test_bad_ids_are_refused(ids, message):
    with pytest.raises(IncompatibleError, match=message):
        plan_groups(ids)
