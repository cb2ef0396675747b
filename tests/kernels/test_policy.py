from __future__ import annotations

import math

from compose.kernels.policy import MAX_GATHERED, gather_cost, segments_cost, stacked_cost


def test_many_rank_rows_favour_gathering_over_one_large_product():
    few, many = stacked_cost(32, 8, 1024), stacked_cost(32, 256, 1024)
    gathered = gather_cost(32, 32, 8, 1024, cached=True)
    assert few < gathered < many


def test_gathering_anew_costs_more_than_keeping():
    assert gather_cost(32, 32, 8, 1024, cached=False) > gather_cost(32, 32, 8, 1024, cached=True)


def test_factors_beyond_the_memory_limit_are_never_gathered():
    assert math.isinf(gather_cost(MAX_GATHERED // 1024 + 1, 1, 1, 1024, cached=True))
    assert not math.isinf(gather_cost(MAX_GATHERED // 1024, 1, 1, 1024, cached=True))


def test_sorting_wins_for_many_tokens_of_many_adapters():
    assert segments_cost(2048, 32, 1024) < stacked_cost(2048, 256, 1024)
    assert segments_cost(2048, 2, 1024) > stacked_cost(2048, 16, 1024)
