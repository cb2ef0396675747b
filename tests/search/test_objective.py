import logging

import numpy as np
import pytest

from compose.errors import IncompatibleError
from compose.search.objective import INVALID_LOSS, Evaluation, cleaned, normalised_example_weights


class Weighted:
    differentiable = False

    def __init__(self, weights):
        self.example_weights = np.asarray(weights)


def test_example_weights_are_normalised():
    np.testing.assert_array_equal(normalised_example_weights(Weighted([1, 3])), [0.25, 0.75])


@pytest.mark.parametrize("weights", [[], [[1.0]], [1.0, -1.0], [0.0, 0.0], [np.nan], [np.inf, 1.0]])
def test_bad_example_weights_are_refused(weights):
    with pytest.raises(IncompatibleError, match="example_weights"):
        normalised_example_weights(Weighted(weights))


def test_broken_losses_become_finite_and_blank_the_gradient_of_their_row_only(caplog):
    losses = np.array([[1.0, np.nan], [2.0, 3.0], [np.inf, -np.inf], [1e9, 0.0]])
    gradients = np.arange(8.0).reshape(4, 2)
    with caplog.at_level(logging.WARNING):
        result, count = cleaned(Evaluation(losses, gradients, 4.0), (4, 2), (4, 2))
    big = INVALID_LOSS
    np.testing.assert_array_equal(result.losses, [[1.0, big], [2.0, 3.0], [big, big], [big, 0.0]])
    np.testing.assert_array_equal(np.isnan(result.gradients).all(axis=1), [True, False, True, True])
    np.testing.assert_array_equal(result.gradients[1], [2.0, 3.0])
    assert count == 3
    assert "3 of 4 candidates" in caplog.text


def test_a_broken_gradient_alone_blanks_its_row():
    result, count = cleaned(Evaluation(np.ones((2, 1)), np.array([[1.0, np.inf], [1.0, 2.0]]), 2.0), (2, 1), (2, 2))
    assert np.isnan(result.gradients[0]).all()
    assert count == 1
    np.testing.assert_array_equal(result.losses, np.ones((2, 1)))


def test_the_objective_s_own_arrays_are_not_changed():
    losses = np.array([[np.nan]])
    cleaned(Evaluation(losses, None, 1.0), (1, 1), (1, 1))
    assert np.isnan(losses).all()


@pytest.mark.parametrize(("losses", "gradients", "word"), [((3, 2), (2, 5), "losses"), ((2, 2), (2, 4), "gradients")])
def test_wrong_shapes_are_named(losses, gradients, word):
    with pytest.raises(IncompatibleError, match=word):
        cleaned(Evaluation(np.ones(losses), np.ones(gradients), 1.0), (2, 2), (2, 5))
