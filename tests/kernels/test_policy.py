from __future__ import annotations

from typing import get_args

import pytest
import torch

from compose.kernels import policy
from compose.kernels.measure import SECTIONS
from compose.kernels.policy_table import COSTS

WORK = policy.Work(
    tokens=512, lists=512, chosen=1, rank=8, adapters=32, active_rows=256, all_rows=256, longest=16, products=4096,
    copied_rows=0, width=2048, itemsize=4,
)  # fmt: skip


def test_the_table_has_every_section_and_only_constants_that_fit_the_features():
    assert set(COSTS) == set(SECTIONS)
    for section, constants in COSTS.items():
        assert set(constants) == set(get_args(policy.Strategy)), section
        for strategy, values in constants.items():
            assert len(values) == len(policy.features(strategy, WORK))
            assert min(values) >= 0.0


def test_the_cost_is_a_weighted_sum_of_the_features():
    assert policy.features("stacked", WORK) == (1.0, 512 * 256 * 2048, 512 * 2048, 256 * 2048, 512 * 256)
    assert policy.cost("stacked", WORK, (7.0, 0.0, 2.0, 0.0, 0.0)) == 7.0 + 2.0 * 512 * 2048


def test_the_least_predicted_cost_wins_among_the_candidates(monkeypatch):
    table = {"stacked": (1.0,) + (0.0,) * 4, "segments": (2.0,) + (0.0,) * 5, "rows": (3.0,) + (0.0,) * 5}
    monkeypatch.setitem(COSTS, "grouped float32 training", table)
    arguments = ("grouped", torch.float16, WORK)  # ranked like float32
    assert policy.fastest(*arguments, ["rows", "segments", "stacked"], training=True) == "stacked"
    assert policy.fastest(*arguments, ["rows", "segments"], training=True) == "segments"


def test_padding_is_left_when_one_adapter_has_most_tokens():
    work = WORK._replace(itemsize=2, adapters=64, active_rows=512, all_rows=512, longest=8)
    candidates = get_args(policy.Strategy)
    assert policy.fastest("grouped", torch.bfloat16, work, candidates, training=False) == "padded"
    skewed = work._replace(longest=256)
    assert policy.fastest("grouped", torch.bfloat16, skewed, candidates, training=False) != "padded"


@pytest.mark.parametrize(
    ("change", "stack", "missing"),
    [
        ({}, {}, set()),
        ({}, {"dtype": torch.float64}, {"grouped_mm", "padded", "bag"}),
        ({}, {"dtype": torch.float16}, {"grouped_mm", "padded", "bag"}),
        ({}, {"width": 130}, {"grouped_mm"}),
        ({"rank": 65}, {}, {"rows"}),
        ({"copied_rows": policy.MAX_GATHERED // 2048 + 1}, {}, {"grouped_mm", "padded"}),
    ],
    ids=["all", "float64", "float16", "odd width", "large gather", "large copy"],
)
def test_what_cannot_run_or_copies_too_much_is_no_candidate(make_stack, change, stack, missing):
    made = make_stack(**{"ranks": (8, 8), "width": 16, "out": 8, "dtype": torch.float32} | stack)
    found = policy.allowed(WORK._replace(lists=32, **change), made, kept=True)
    assert set(found) == set(get_args(policy.Strategy)) - missing


def test_gathering_in_every_call_is_bounded_more_tightly_unless_many_tokens_share_it(make_stack):
    stack = make_stack((8, 8), 16, 8, dtype=torch.float32)
    work = WORK._replace(tokens=128, lists=128)  # 2 Mi entries
    assert "rows" in policy.allowed(work, stack, kept=True)
    assert "rows" not in policy.allowed(work, stack, kept=False)
    assert "rows" in policy.allowed(work._replace(tokens=1024), stack, kept=False)
