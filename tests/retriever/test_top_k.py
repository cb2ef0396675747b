import numpy as np
import pytest

from compose.retriever.top_k import top_k


@pytest.mark.parametrize("k", [1, 3, 7, 40, 99])
def test_it_is_a_stable_sort_cut_off(k: int) -> None:
    scores = np.random.default_rng(0).integers(0, 5, (6, 40)).astype(np.float32)  # many ties, at the border too
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top_k(scores, k), expected)


def test_minus_infinity_comes_last() -> None:
    np.testing.assert_array_equal(top_k(np.array([[-np.inf, 1.0, -np.inf, 2.0]]), 3), [[3, 1, 0]])


def test_nothing_of_nothing() -> None:
    assert top_k(np.zeros((2, 0)), 3).shape == (2, 0)
    assert top_k(np.zeros((0, 4)), 3).shape == (0, 3)
