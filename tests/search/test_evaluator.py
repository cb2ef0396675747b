import numpy as np
import pytest

from compose.search.evaluator import ASSUMED_GRADIENT_COST, Budget, Evaluator
from compose.search.space import Space


def make(quadratic, **budget):
    objective = quadratic([0.5, -0.2], noise=0.3)
    return objective, Evaluator(objective, Space(num_adapters=2, l1=0.1), Budget(**budget))


def test_answers_from_memory_are_the_objectives_and_free(quadratic):
    objective, evaluator = make(quadratic, cost=50)
    rows = np.array([[0.1, 0.2], [0.3, 0.0], [0.1, 0.2], [0.3, -0.0]])
    first = evaluator.losses(rows)
    again = evaluator.losses(rows[::-1])
    assert (evaluator.evaluations, evaluator.cost, len(objective.calls)) == (2, 2.0, 1)
    np.testing.assert_array_equal(first, objective(rows).losses)
    np.testing.assert_array_equal(again, first[::-1])


def test_a_row_evaluated_with_its_gradient_is_remembered_but_gradients_are_not(quadratic):
    _, evaluator = make(quadratic, cost=50)
    rows, even = np.array([[0.1, 0.2]]), np.full((1, 4), 0.25)
    losses, _ = evaluator.losses_and_gradients(rows, even)
    np.testing.assert_array_equal(evaluator.losses(rows), losses)
    assert evaluator.cost == 2.5
    evaluator.losses_and_gradients(rows, even)
    assert evaluator.cost == 5.0


def test_gradients_are_assumed_dear_until_their_cost_is_known(quadratic):
    _, evaluator = make(quadratic, cost=31)
    assert evaluator.affordable(gradient=True) == 31 // ASSUMED_GRADIENT_COST
    evaluator.losses_and_gradients(np.zeros((1, 2)), np.full((1, 4), 0.25))
    assert evaluator.affordable(gradient=True) == 11  # 28.5 left at 2.5 each
    assert evaluator.affordable(gradient=True, cost_limit=10.0) == 3  # 7.5 left under the limit


def test_history_and_best_follow_the_penalised_full_data_value(quadratic):
    objective, evaluator = make(quadratic, cost=50)
    for rows in (np.zeros((1, 2)), np.array([[0.5, -0.2]]), np.array([[1.5, 1.5]])):
        evaluator.losses(rows)
    value = objective(np.array([[0.5, -0.2]])).losses.mean() + 0.1 * 0.35
    np.testing.assert_array_equal(evaluator.best.weights, [0.5, -0.2])
    assert evaluator.best.value == pytest.approx(value)
    assert [best for _, best in evaluator.history][1:] == [evaluator.best.value] * 2
