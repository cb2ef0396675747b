import numpy as np
import pytest

from compose.errors import IncompatibleError
from compose.search.evaluator import Budget
from compose.search.procedure import search
from compose.search.space import Space
from compose.search.strategies.gradient import Gradient
from compose.search.strategies.lbfgs import _two_loops


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_l1_finds_a_planted_sparse_vector_and_leaves_exact_zeros(method, quadratic):
    target = np.zeros(20)
    target[[3, 11]] = [0.8, -0.6]
    objective = quadratic(target, num_examples=6, noise=0.02, seed=3)
    space = Space(num_adapters=20, l1=0.2)
    strategy = Gradient(method=method, steps=150, patience=150)
    result = search(objective, space, strategy=strategy, budget=Budget(cost=1000), starts=np.full((1, 20), 0.05))
    weights = result.weights[0]
    assert set(np.argsort(-np.abs(weights))[:2]) == {3, 11}
    assert (weights == 0).sum() >= 12
    np.testing.assert_allclose(weights[[3, 11]], target[[3, 11]], atol=0.15)
    free = search(
        objective, Space(num_adapters=20), strategy=strategy, budget=Budget(cost=1000), starts=np.full((1, 20), 0.05)
    )
    assert (free.weights == 0).sum() == 0


def test_lbfgs_reaches_the_minimum_of_an_ill_conditioned_quadratic_in_few_steps(quadratic):
    objective = quadratic(np.linspace(-1, 1, 6), num_examples=1, identity=True)
    objective.maps = (np.diag([1, 2, 4, 8, 10, 12.0]),)
    strategy = Gradient(method="lbfgs", steps=40, tolerance=0.0)
    result = search(objective, Space(num_adapters=6), strategy=strategy, starts=np.zeros((1, 6)))
    np.testing.assert_allclose(result.weights[0], objective.target, atol=1e-3)


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_a_minimum_outside_is_met_at_the_bound(method, quadratic):
    objective = quadratic([4.0, -4.0, 0.2], identity=True)
    result = search(objective, Space(num_adapters=3), strategy=Gradient(method=method, steps=80))
    np.testing.assert_allclose(result.weights[0], [1.5, -1.5, 0.2], atol=0.02)


def test_it_never_starts_at_zero_where_zero_is_stationary():
    space = Space(num_adapters=4, zero_is_stationary=True)
    starts = np.stack([np.zeros(4), np.eye(4)[1]])
    np.testing.assert_array_equal(Gradient().start(space, starts=starts).ask(), [[0.25] * 4, [0, 1, 0, 0]])
    np.testing.assert_array_equal(Gradient().start(space).ask(), [[0.25] * 4])


def test_default_starts_are_zero_and_uniform():
    np.testing.assert_array_equal(Gradient().start(Space(num_adapters=2)).ask(), [[0, 0], [0.5, 0.5]])


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_the_race_keeps_the_start_with_the_lowest_value(method, quadratic):
    objective = quadratic([1.0, 1.0], identity=True)
    starts = np.array([[-1.5, -1.5], [0.5, 0.9], [-1.0, 0.0]])
    state = Gradient(method=method, race=2, steps=6).start(Space(num_adapters=2), starts=starts)
    sizes = []
    while not state.done:
        rows = state.ask()
        sizes.append(len(rows))
        result = objective(rows, gradient=True, example_weights=np.full((len(rows), 4), 0.25))
        state.tell(rows, result.losses.mean(axis=1), result.gradients)
    assert sizes[:3] == [3, 3, 1]
    assert np.linalg.norm(rows[-1] - 1.0) < 0.5


def test_a_broken_row_steps_back_to_its_best_point_with_half_the_rate():
    state = Gradient(learning_rate=0.2, decay=1.0).start(Space(num_adapters=2), starts=np.array([[1.0, 1.0]]))
    slope = np.array([[1.0, -1.0]])
    asked = [state.ask()]
    state.tell(asked[0], np.array([1.0]), slope)
    asked.append(state.ask())
    state.tell(asked[1], np.array([1e6]), np.full((1, 2), np.nan))
    asked.append(state.ask())
    state.tell(asked[2], np.array([1.0]), slope)
    asked.append(state.ask())
    np.testing.assert_allclose(np.concatenate(asked), [[1, 1], [0.8, 1.2], [1, 1], [0.9, 1.1]], atol=1e-9)


def test_two_loops_equal_the_explicit_bfgs_inverse():
    generator = np.random.default_rng(0)
    root = generator.standard_normal((4, 4))
    hessian = root @ root.T + np.eye(4)
    pairs = [(step, hessian @ step) for step in generator.standard_normal((3, 4))]
    step, change = pairs[-1]
    inverse = np.eye(4) * (step @ change) / (change @ change)
    for step, change in pairs:  # Nocedal and Wright, eq. 6.17
        rho = 1 / (step @ change)
        left = np.eye(4) - rho * np.outer(step, change)
        inverse = left @ inverse @ left.T + rho * np.outer(step, step)
    gradient = generator.standard_normal(4)
    np.testing.assert_allclose(_two_loops(gradient, pairs), inverse @ gradient, rtol=1e-10)


def test_a_row_on_a_plateau_ends():
    state = Gradient(patience=3, steps=40).start(Space(num_adapters=2), starts=np.ones((1, 2)))
    asked = 0
    while not state.done:
        rows = state.ask()
        state.tell(rows, np.ones(1), np.full((1, 2), 1e-3))
        asked += 1
    assert asked == 4


def test_rows_do_not_influence_each_other(quadratic):
    objective = quadratic([0.7, -0.2, 0.1], noise=0.3)
    starts = np.array([[1.0, 0, 0], [0, 0, 0], [0, -1.0, 1.0]])

    def last(points):
        state = Gradient(steps=8).start(Space(num_adapters=3), starts=points)
        while not state.done:
            rows = state.ask()
            result = objective(rows, gradient=True, example_weights=np.full((len(rows), 4), 0.25))
            state.tell(rows, result.losses.mean(axis=1), result.gradients)
        return rows

    np.testing.assert_array_equal(last(starts)[2], last(starts[2:])[0])


def test_an_objective_without_gradients_is_refused(quadratic):
    with pytest.raises(IncompatibleError, match="no gradients"):
        search(quadratic([1.0], differentiable=False), Space(num_adapters=1), strategy="gradient")


@pytest.mark.parametrize("options", [{"method": "sgd"}, {"learning_rate": 0.0}, {"decay": 0.0}, {"steps": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"must|need"):
        Gradient(**options)
