import numpy as np
import pytest

from compose.search.space import Space
from compose.search.strategies.random_search import RandomSearch


def draws(population, **kwargs):
    state = RandomSearch(population=population, **kwargs).start(Space(num_adapters=12), seed=4, evaluations=60)
    rows = []
    while not state.done:
        rows.append(state.ask())
    return np.concatenate(rows)


def test_the_stream_does_not_depend_on_the_population_size():
    np.testing.assert_array_equal(draws(7), draws(16))


def test_sparse_draws_have_one_to_three_adapters_of_at_least_a_thirtieth_of_the_bound():
    rows = draws(16, sparse=1.0)
    counts = (rows != 0).sum(axis=1)
    assert set(counts) == {1, 2, 3}
    assert np.abs(rows[rows != 0]).min() >= 1.5 / 30
    assert ((rows > 0).any(), (rows < 0).any()) == (True, True)
    assert ((draws(16, sparse=0.0) != 0).sum(axis=1) == 12).all()


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="population"):
        RandomSearch(population=0)
