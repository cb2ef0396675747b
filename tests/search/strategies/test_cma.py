import logging

import numpy as np
import pytest

from compose.search.space import Space
from compose.search.strategies.cma import Cma


def test_few_evaluations_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        Cma().start(Space(num_adapters=4), evaluations=199)
    assert "at least 200" in caplog.text
    caplog.clear()
    Cma().start(Space(num_adapters=4), evaluations=200)
    assert caplog.text == ""


def test_seed_zero_is_a_seed():
    first, again = (Cma().start(Space(num_adapters=5), seed=0).ask() for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_no_file_in_the_working_directory_is_read_or_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cma_signals.in").write_text("{'timeout': 0, 'maxiter': 0}")
    state = Cma().start(Space(num_adapters=3), seed=1)
    for _ in range(5):
        assert not state.done
        rows = state.ask()
        state.tell(rows, np.square(rows).sum(axis=1), None)
    assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]


def test_the_start_and_the_population_are_used():
    state = Cma(sigma0=1e-3, population=12).start(Space(num_adapters=3), starts=np.array([[0.5, -0.5, 1.0]]))
    rows = state.ask()
    assert rows.shape == (12, 3)
    np.testing.assert_allclose(rows, np.tile([0.5, -0.5, 1.0], (12, 1)), atol=0.01)


@pytest.mark.parametrize("options", [{"sigma0": 0.0}, {"population": 1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        Cma(**options)
