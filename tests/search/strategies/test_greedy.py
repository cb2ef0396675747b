import numpy as np

from compose.search.evaluator import Budget
from compose.search.procedure import search
from compose.search.space import Space
from compose.search.strategies.greedy import Greedy


def test_a_round_is_one_population_and_the_planted_adapters_are_added_in_order_of_gain(quadratic):
    target = np.zeros(10)
    target[[2, 7]] = [0.5, 1.0]
    objective = quadratic(target, identity=True)
    result = search(objective, Space(num_adapters=10), strategy=Greedy(grid=(0.5, 1.0)), budget=Budget(cost=500))
    np.testing.assert_array_equal(result.weights[0], target)
    assert [round(value, 6) for _, value in result.history] == [0.725, 0.225, 0.1, 0.1]
    # base, all 20 first moves, then all moves but those already in memory
    assert [len(weights) for weights, _, _ in objective.calls] == [1, 20, 18, 17]


def test_no_more_than_max_adapters_are_on(quadratic):
    objective = quadratic([1.0, 0.9, 0.8, 0.7], identity=True)
    result = search(objective, Space(num_adapters=4), strategy=Greedy(max_adapters=2))
    assert np.count_nonzero(result.weights) == 2
    assert (result.weights[0, :2] == 1.0).all()


def test_it_stays_at_the_base_when_nothing_helps(quadratic):
    result = search(quadratic([0.0, 0.0], identity=True), Space(num_adapters=2), strategy="greedy")
    assert result.choice == "base"
    assert not result.weights.any()
