import gc
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from compose.search.evaluator import Budget
from compose.search.objective import Evaluation
from compose.search.procedure import search
from compose.search.space import Space
from compose.search.strategies.cobyla import Cobyla, _reflect

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "nevergrad_cobyla.json").read_text())


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "compose-cobyla"]


def value(weights, target):
    return np.square(weights - target).sum(axis=1) + 0.05 * np.abs(weights).mean(axis=1)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"N={golden['num_adapters']}")
def test_the_trace_is_lorahubs(golden):
    """Golden traces: nevergrad 1.0.12, NGOpt, ng.p.Array(init=[0] * N, lower=-1.5, upper=1.5), budget 40.

    Compared over the simplex and the first trust-region steps; later ones depend on SciPy's version (with 1.17.1 all
    40 agree to 1e-12).
    """
    target = np.array(golden["target"])
    state = Cobyla().start(Space(num_adapters=golden["num_adapters"]), evaluations=40)
    for number in range(golden["num_adapters"] + 3):
        weights = state.ask()
        np.testing.assert_allclose(weights[0], golden["weights"][number], atol=1e-9, err_msg=f"evaluation {number}")
        state.tell(weights, value(weights, target), None)
    state.close()


def test_adapters_are_switched_on_in_order_keeping_those_that_helped():
    target = np.array([0.6, -0.6, 0.6, -0.6, 0.6])
    state = Cobyla().start(Space(num_adapters=5), evaluations=40)
    kept = np.zeros(5)
    asked = state.ask()
    np.testing.assert_array_equal(asked[0], kept)
    state.tell(asked, value(asked, target), None)
    for adapter in range(5):
        asked = state.ask()
        expected = kept.copy()
        expected[adapter] = 0.5
        np.testing.assert_allclose(asked[0], expected, atol=1e-12)
        state.tell(asked, value(asked, target), None)
        if target[adapter] > 0:
            kept = expected
    state.close()


def test_forty_evaluations_are_forty_with_the_base_among_them(quadratic):
    objective = quadratic(np.linspace(-1, 1, 20))
    result = search(objective, Space(num_adapters=20, l1=0.05), strategy="cobyla", budget=Budget(evaluations=40))
    assert (result.evaluations, len(result.history)) == (40, 40)


def test_reflection_bounces_once_then_clips():
    # 2.0 passes 1.5 by 0.5 and returns to 1.0; 6.0 would return to -3.0, beyond the other bound.
    np.testing.assert_allclose(_reflect(np.array([2.0, -1.7, 6.0, 0.3]), 1.5), [1.0, -1.3, -1.5, 0.3])


def test_closing_ends_the_thread():
    state = Cobyla().start(Space(num_adapters=3), evaluations=40)
    state.ask()
    assert len(threads()) == 1
    state.close()
    assert threads() == []
    assert state.done


def test_an_abandoned_search_leaves_no_thread():
    state = Cobyla().start(Space(num_adapters=3), evaluations=40)
    state.ask()
    (thread,) = threads()
    del state
    gc.collect()
    thread.join(timeout=10)
    assert threads() == []


def test_a_state_that_never_asked_has_no_thread():
    Cobyla().start(Space(num_adapters=3)).close()
    assert threads() == []


class Failing:
    example_weights = np.ones(2)
    differentiable = False

    def __init__(self, error):
        self.error = error
        self.calls = 0

    def __call__(self, weights, *, gradient=False, example_weights=None):
        self.calls += 1
        if self.calls == 4:
            raise self.error
        return Evaluation(np.ones((len(weights), 2)), None, float(len(weights)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_of_the_objective_leaves_no_thread(error):
    with pytest.raises(error):
        search(Failing(error), Space(num_adapters=8), strategy="cobyla")
    assert threads() == []
