import subprocess
import sys

import numpy as np
import pytest

from compose.errors import IncompatibleError, UnknownNameError
from compose.search.evaluator import Budget
from compose.search.guard import Guard
from compose.search.procedure import search
from compose.search.space import Space
from compose.search.strategies.cma import Cma


def test_unknown_strategies_get_a_hint(quadratic):
    with pytest.raises(UnknownNameError, match="did you mean 'cobyla'"):
        search(quadratic([1.0]), Space(num_adapters=1), strategy="cobila")


@pytest.mark.parametrize("starts", [np.zeros(2), np.zeros((1, 3)), np.zeros((0, 2)), np.full((1, 2), np.nan)])
def test_bad_starts_are_refused(quadratic, starts):
    with pytest.raises(IncompatibleError, match="starts"):
        search(quadratic([1.0, 0.0]), Space(num_adapters=2), strategy="gradient", starts=starts)


def test_a_budget_needs_a_limit():
    with pytest.raises(IncompatibleError, match=r"cost .* evaluations"):
        Budget()
    with pytest.raises(IncompatibleError, match="at least 1"):
        Budget(evaluations=0)


def test_token_weights_decide_the_mean(quadratic):
    objective = quadratic([0.8, 0.0], noise=0.4, num_examples=3, identity=True)
    objective.example_weights = np.array([0.0, 10.0, 0.0])
    result = search(objective, Space(num_adapters=2), strategy="gradient")
    np.testing.assert_allclose(result.weights[0], objective.targets[1], atol=0.02)
    assert result.value == pytest.approx(result.per_example[1])


def test_a_named_strategy_can_be_guarded(noisy, quadratic):
    space = Space(num_adapters=6)
    refused = search(noisy(6, 5, seed=0), space, strategy="gradient", guard=Guard())
    assert refused.choice == "base"
    objective = quadratic([0.6, 0, -0.6, 0, 0.5, 0], noise=0.02, num_examples=6)
    accepted = search(objective, space, strategy=Cma(), guard=Guard(), budget=Budget(cost=2000))
    assert accepted.choice == "scalar"
    assert [row.kind for row in accepted.guard] == ["base", "single", "scalar"]


def test_progress_is_reported_after_every_population(quadratic):
    reports = []
    objective = quadratic([0.5, 0.5])
    result = search(objective, Space(num_adapters=2), strategy="greedy", progress=reports.append)
    assert [(report.cost, report.best_value) for report in reports] == list(result.history)
    assert len(reports) == len(objective.calls)
    assert [report.stage for report in reports[:2]] == ["base", "scalar"]


def test_importing_the_search_loads_no_torch():
    code = (
        "import sys, compose.search.procedure as p; p.strategy_names(); "
        "sys.exit(bool({'torch', 'transformers', 'cma'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd="/").returncode == 0
