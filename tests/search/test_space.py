import numpy as np
import pytest

from compose.errors import IncompatibleError
from compose.search.space import Space


def test_l1_is_lorahubs_regulariser_with_one_group():
    # LoRAHub (algorithm.py, default_l1_regularization): 0.05 * sum |w| / len(w)
    weights = np.array([[0.5, -1.0, 0.0, 0.25]])
    np.testing.assert_allclose(Space(num_adapters=4, l1=0.05).penalty(weights), [0.05 * 1.75 / 4], rtol=1e-15)


def test_a_scalar_costs_the_same_in_any_number_of_groups():
    scalars = np.array([[0.5, -1.0, 0.3]])
    space = Space(num_adapters=3, num_groups=4, l1=0.2, smoothness=5.0)
    np.testing.assert_allclose(space.penalty(space.expand(scalars)), space.scalar().penalty(scalars), rtol=1e-15)


def test_expansion_puts_adapter_n_of_group_g_at_g_n():
    space = Space(num_adapters=2, num_groups=3)
    np.testing.assert_array_equal(space.expand(np.array([[1.0, 2.0]])), [[1, 2, 1, 2, 1, 2]])
    np.testing.assert_array_equal(space.one_hot([1]), [0, 1, 0, 1, 0, 1])


def test_smoothness_by_hand():
    # Groups (0, 0), (1, 0), (1, 2): squared steps 1 and 4 over (3 - 1) * 2 entries.
    space = Space(num_adapters=2, num_groups=3, smoothness=2.0)
    np.testing.assert_allclose(space.penalty(np.array([[0.0, 0, 1, 0, 1, 2]])), [2.0 * 5 / 4], rtol=1e-15)


def test_penalised_gradient_is_the_derivative_of_the_penalty():
    space = Space(num_adapters=3, num_groups=4, l1=0.7, smoothness=1.3)
    generator = np.random.default_rng(0)
    weights = generator.uniform(0.2, 1, (2, 12)) * generator.choice([-1, 1], (2, 12))
    gradient = space.penalised_gradient(weights, np.zeros((2, 12)))
    step = 1e-6
    for column in range(12):
        moved = np.zeros((2, 12))
        moved[:, column] = step
        slope = (space.penalty(weights + moved) - space.penalty(weights - moved)) / (2 * step)
        np.testing.assert_allclose(gradient[:, column], slope, atol=1e-8)


def test_l1_holds_a_zero_coefficient_unless_the_loss_pulls_harder():
    space = Space(num_adapters=2, l1=1.0)  # holds with 1 / 2 per coefficient
    held = space.penalised_gradient(np.zeros((1, 2)), np.array([[0.4, -0.9]]))
    np.testing.assert_allclose(held, [[0.0, -0.4]], atol=1e-15)


def test_reduce_is_the_adjoint_of_expand():
    space = Space(num_adapters=3, num_groups=4)
    generator = np.random.default_rng(1)
    scalars, gradients = generator.standard_normal((2, 3)), generator.standard_normal((2, 12))
    np.testing.assert_allclose(
        (space.expand(scalars) * gradients).sum(axis=1), (scalars * space.reduce(gradients)).sum(axis=1), rtol=1e-12
    )


def test_all_problems_are_reported_at_once():
    with pytest.raises(IncompatibleError, match=r"num_groups.*l1.*bound"):
        Space(num_adapters=2, num_groups=0, l1=-1.0, bound=0.0)
