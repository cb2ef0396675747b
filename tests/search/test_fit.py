import numpy as np
import pytest

from compose.search.auto import Staged
from compose.search.evaluator import Budget, Evaluator
from compose.search.fit import Point, make_lanes, run_lanes, validated_losses
from compose.search.guard import Guard
from compose.search.objective import Evaluation
from compose.search.space import Space


class Table:
    """One coefficient; example 0 wants 1.0, example 1 wants 0.6."""

    differentiable = False
    example_weights = np.ones(2)

    def __call__(self, weights, *, gradient=False, example_weights=None):
        losses = np.square(weights - np.array([[1.0, 0.6]]))
        return Evaluation(losses, None, float(len(weights)))


class Scripted:
    """Asks one given point after another."""

    needs_gradient = False

    def __init__(self, points):
        self.points = list(points)
        self.told = []
        self.closed = False

    @property
    def done(self):
        return len(self.told) == len(self.points)

    def ask(self):
        return np.array([[self.points[len(self.told)]]])

    def tell(self, weights, values, gradients):
        self.told.append(float(values[0]))

    def close(self):
        self.closed = True


def run(scripts, guard, folds=((0,), (1,)), budget=1000):
    space = Space(num_adapters=1)
    evaluator = Evaluator(Table(), space, Budget(cost=budget))
    lanes = make_lanes(evaluator.example_weights, [np.array(fold) for fold in folds])
    states = [Scripted(script) for script in scripts]
    return run_lanes(evaluator, space, space, lanes, states, guard), lanes, states


def test_each_lane_is_told_its_own_mean_and_validated_on_what_it_did_not_see():
    _, lanes, states = run([[0.5], [0.7], [0.2]], Guard())
    assert states[0].told == pytest.approx([(0.25 + 0.01) / 2])
    assert states[1].told == pytest.approx([0.01])  # without example 0: (0.7 - 0.6)^2
    assert states[2].told == pytest.approx([0.64])  # without example 1: (0.2 - 1.0)^2
    points = [lane.at(0) for lane in lanes]
    np.testing.assert_allclose(validated_losses(points, lanes), [0.09, 0.16])  # (0.7 - 1)^2, (0.2 - 0.6)^2


def overfitting():
    """Fold 1 (sees 0.6) and fold 2 (sees 1.0) walk to their own example: validation is best where they pass 0.8."""
    whole = np.linspace(0.3, 0.8, 9)
    return [whole, np.linspace(1.0, 0.6, 9), np.linspace(0.6, 1.0, 9)]


def test_the_step_of_lowest_validated_loss_is_kept():
    # Both folds start at the other's answer (validated loss 0) and move away from it.
    fit, _, _ = run(overfitting(), Guard(patience=20))
    assert (fit.steps, fit.chosen_step) == (9, 0)
    assert [point.weights[0] for point in fit.points] == pytest.approx([0.3, 1.0, 0.6])
    forwards = [np.linspace(0.3, 0.8, 9), np.linspace(0.2, 0.6, 9), np.linspace(0.6, 1.0, 9)]
    fit, _, _ = run(forwards, Guard(patience=20))
    # Validated: (w1 - 1)^2 + (w2 - 0.6)^2 with w1 = 0.2 + t, w2 = 0.6 + t, t = 0, 0.05 .. 0.4: lowest at the end.
    assert fit.chosen_step == 8


def test_the_fit_ends_when_the_validated_loss_stops_improving():
    fit, _, states = run(overfitting(), Guard(patience=3))
    assert fit.steps == 4
    assert [len(state.told) for state in states] == [4, 4, 4]
    assert all(state.closed for state in states)


def test_without_folds_the_last_recommendation_is_kept():
    fit, _, _ = run([[0.1, 0.8, 0.3]], Guard(), folds=())
    assert (fit.steps, fit.chosen_step) == (3, 2)
    assert fit.points[0].weights[0] == 0.8


def test_a_lane_that_ends_early_keeps_its_recommendation():
    fit, _, _ = run([[0.1, 0.5, 0.7], [0.6], [1.0]], Guard(patience=20))
    assert fit.steps == 3
    assert fit.points[1].weights[0] == 0.6


def test_lanes_are_never_cut_apart_by_the_budget():
    fit, _, states = run([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], Guard(), budget=5)
    assert fit.steps == 1
    assert [len(state.told) for state in states] == [1, 1, 1]
    nothing, _, _ = run([[0.1], [0.3], [0.5]], Guard(), budget=2)
    assert nothing is None


def point(weight):
    return Point(np.array([weight]), np.square(weight - np.array([1.0, 0.6])), 0.0)


def test_shrinking_keeps_the_position_that_validates_best():
    space = Space(num_adapters=1)
    evaluator = Evaluator(Table(), space, Budget(cost=100))
    staged = Staged(evaluator, space, Guard(), 2, seed=0)
    # From the simple 0 (whole), 0.9, 0.5 to the fitted 0.8, 1.3, 0.9: a quarter of the way the folds pass 1.0 and 0.6,
    # which is what the examples they did not see want.
    kept = staged.shrink("shrink", [point(0.0), point(0.9), point(0.5)], [point(0.8), point(1.3), point(0.9)])
    assert [one.weights[0] for one in kept] == pytest.approx([0.2, 1.0, 0.6])
    assert staged.stages[-1].note.startswith("kept 0.25")
    assert staged.stages[-1].validated == pytest.approx(0.0)
    # The other way round the fitted weights themselves are best.
    kept = staged.shrink("shrink", [point(0.0), point(0.2), point(0.2)], [point(0.8), point(1.0), point(0.6)])
    assert [one.weights[0] for one in kept] == [0.8, 1.0, 0.6]
