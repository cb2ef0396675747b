from __future__ import annotations

from typing import get_args

import pytest
import torch

from compose.kernels import policy
from compose.kernels.lines import WHOLE_BYTES
from compose.kernels.measure import SECTIONS
from compose.kernels.policy_table import COSTS

WORK = policy.Work(
    tokens=512, lists=512, chosen=1, rank=8, adapters=32, lined=32, active_rows=256, all_rows=256, longest=16,
    products=4096, copied_rows=0, width=2048, itemsize=4,
)  # fmt: skip


def test_the_table_has_every_section_and_only_constants_that_fit_the_features():
    assert set(COSTS) == set(SECTIONS)
    for section, constants in COSTS.items():
        assert set(constants) == set(get_args(policy.Strategy)), section
        for strategy, values in constants.items():
            assert len(values) == len(policy.features(strategy, WORK))
            assert min(values) >= 0.0


def test_the_cost_is_a_weighted_sum_of_the_features():
    far = 512 * 2048 - (1 << 20) / 4
    assert policy.features("stacked", WORK) == (1.0, 512 * 256 * 2048, 512 * 2048, 256 * 2048, 512 * 256, far, 0.0)
    assert policy.cost("stacked", WORK, (7.0, 0.0, 2.0, 0.0, 0.0, 1.0, 0.0)) == 7.0 + 2.0 * 512 * 2048 + far


def test_rows_beyond_the_cache_and_beyond_what_the_system_keeps_are_counted_from_there_on():
    for strategy in get_args(policy.Strategy):
        small, large = (
            policy.features(strategy, WORK._replace(tokens=tokens, lists=tokens, lined=1, longest=tokens))
            for tokens in (16, 65536)
        )
        assert small[-2:] == (0.0, 0.0)
        assert large[-2] - large[-1] == (2 * WHOLE_BYTES - (1 << 20)) / 4 > 0


def test_padding_counts_the_lines_of_adapters_that_do_not_occur():
    assert policy.features("padded", WORK._replace(lined=40))[2] == 40 * 16 * 2048


def test_the_least_predicted_cost_wins_among_the_candidates(monkeypatch):
    table = {"stacked": (1.0,) + (0.0,) * 6, "segments": (2.0,) + (0.0,) * 7, "rows": (3.0,) + (0.0,) * 7}
    monkeypatch.setitem(COSTS, "grouped float32 training", table)
    arguments = ("grouped", torch.float16, WORK)  # ranked like float32
    assert policy.fastest(*arguments, ["rows", "segments", "stacked"], training=True) == "stacked"
    assert policy.fastest(*arguments, ["rows", "segments"], training=True) == "segments"


@pytest.mark.parametrize(
    ("tiles", "dtype", "expected"),
    [
        (True, torch.bfloat16, "grouped bfloat16_amx inference"),
        (False, torch.bfloat16, "grouped bfloat16 inference"),
        (True, torch.float32, "grouped float32 inference"),
        (True, torch.float16, "grouped float32 inference"),
    ],
    ids=str,
)
def test_bfloat16_is_ranked_by_the_table_of_the_cpu_it_runs_on(monkeypatch, tiles, dtype, expected):
    monkeypatch.setattr(policy, "multiplies_in_tiles", lambda: tiles)
    assert policy.section("grouped", dtype, training=False) == expected


@pytest.mark.parametrize("tiles", [True, False])
def test_the_cpu_is_asked_for_tiles_of_bfloat16(monkeypatch, tiles):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles, "avx512_f": True}, raising=False)
    assert policy.multiplies_in_tiles.__wrapped__() == tiles


def test_a_torch_that_cannot_say_counts_as_having_no_tiles(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert policy.multiplies_in_tiles.__wrapped__() is False


@pytest.mark.parametrize("tiles", [True, False], ids=["AMX", "no AMX"])
def test_padding_is_left_when_one_adapter_has_most_tokens(monkeypatch, tiles):
    monkeypatch.setattr(policy, "multiplies_in_tiles", lambda: tiles)
    work = WORK._replace(itemsize=2, adapters=64, lined=64, active_rows=512, all_rows=512, longest=8)
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
