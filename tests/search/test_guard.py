import numpy as np
import pytest

from compose.errors import IncompatibleError
from compose.search.guard import Candidate, Guard, choose, make_folds

EVEN = np.full(5, 0.2)


def candidate(kind, validated, value=None):
    validated = None if validated is None else np.asarray(validated, dtype=np.float64)
    value = float(validated.mean()) if value is None else value
    return Candidate(kind, np.zeros(1), np.zeros(5), value, validated)


def test_few_examples_are_left_out_one_by_one():
    folds = make_folds(np.ones(5) / 5, 5, seed=0)
    assert [fold.tolist() for fold in folds] == [[0], [1], [2], [3], [4]]


def test_folds_partition_the_examples_evenly_and_depend_on_the_seed():
    folds = make_folds(np.ones(23) / 23, 5, seed=0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(23))
    assert sorted(map(len, folds)) == [4, 4, 5, 5, 5]
    again, other = make_folds(np.ones(23) / 23, 5, seed=0), make_folds(np.ones(23) / 23, 5, seed=1)
    assert [f.tolist() for f in folds] == [f.tolist() for f in again]
    assert [f.tolist() for f in folds] != [f.tolist() for f in other]


@pytest.mark.parametrize(
    ("weights", "num_folds"), [([1.0], 5), ([1.0, 0.0], 5), ([0.5, 0.5], 0)], ids=["S=1", "one counts", "off"]
)
def test_there_are_no_folds_where_none_are_possible(weights, num_folds):
    assert make_folds(np.array(weights), num_folds, seed=0) == []


def test_examples_of_weight_zero_are_in_no_fold():
    folds = make_folds(np.array([0.5, 0.0, 0.25, 0.25]), 5, seed=0)
    assert [fold.tolist() for fold in folds] == [[0], [2], [3]]


def test_the_margin_by_hand():
    # Differences 0, 1, 2, 3, 4: mean 2, variance 2, SE = sqrt(2 / 4); Student's t with 4 degrees of freedom at the
    # level of one normal standard deviation (0.8413) is 1.1417 (tables: t(4, 0.8413) = 1.142).
    base, single = candidate("base", [10, 10, 10, 10, 10]), candidate("single", [10, 9, 8, 7, 6])
    row = choose([base, single], EVEN, Guard()).table[1]
    assert row.gain == pytest.approx(2.0)
    assert row.standard_error == pytest.approx(np.sqrt(0.5))
    assert row.margin == pytest.approx(1.1417 * np.sqrt(0.5), rel=1e-4)
    assert row.accepted


def test_a_clear_gain_is_accepted_and_a_doubtful_one_is_not():
    base = candidate("base", [3, 3, 3, 3, 3])
    assert choose([base, candidate("single", [1, 2, 1, 2, 1])], EVEN, Guard()).chosen.kind == "single"
    doubtful = choose([base, candidate("single", [0, 3, 3, 3, 3.2])], EVEN, Guard())
    assert doubtful.chosen.kind == "base"
    assert "does not clearly gain over base on held-out folds" in doubtful.why


def test_a_steady_but_tiny_gain_is_not_worth_it():
    base, single = candidate("base", [3.0] * 5), candidate("single", [2.95] * 5)
    assert choose([base, single], EVEN, Guard()).chosen.kind == "base"
    assert choose([base, single], EVEN, Guard(min_gain=0.01)).chosen.kind == "single"


def test_a_complex_candidate_is_compared_with_the_last_one_accepted():
    kinds = [candidate("base", [3] * 5), candidate("single", [4] * 5), candidate("scalar", [2] * 5)]
    decision = choose([*kinds, candidate("layerwise", [1.99] * 5)], EVEN, Guard())
    assert decision.chosen.kind == "scalar"
    assert [row.against for row in decision.table] == [None, "base", "base", "scalar"]
    assert [row.accepted for row in decision.table] == [True, False, True, False]


def test_example_weights_count():
    base = candidate("base", [3, 3, 3, 3, 3])
    mixed = candidate("single", [1, 1, 1, 1, 30])
    assert choose([base, mixed], np.array([0.25, 0.25, 0.25, 0.25, 0.0]), Guard()).chosen.kind == "single"
    assert choose([base, mixed], EVEN, Guard()).chosen.kind == "base"


def test_without_folds_the_examples_themselves_decide_and_the_reason_says_so():
    decision = choose([candidate("base", None, 3.0), candidate("single", None, 2.0)], EVEN, Guard())
    assert decision.chosen.kind == "single"
    assert "not validated" in decision.why
    assert choose([candidate("base", None, 3.0), candidate("single", None, 2.97)], EVEN, Guard()).chosen.kind == "base"


def test_a_gain_of_nothing_near_a_loss_of_zero_changes_nothing():
    base = Candidate("base", np.zeros(1), np.full(5, 1e-6), 1e-6, np.full(5, 1e-6))
    single = Candidate("single", np.ones(1), np.zeros(5), 0.0, np.zeros(5))
    weights = np.full(5, 0.2)
    assert choose([base, single], weights, Guard()).chosen.kind == "base"
    assert choose([base, single], weights, Guard(floor=0.0)).chosen.kind == "single"


@pytest.mark.parametrize("options", [{"max_folds": 1}, {"min_gain": -1.0}, {"patience": 0}, {"shrink": (1.0,)}])
def test_bad_options_are_refused(options):
    with pytest.raises(IncompatibleError, match=r"max_folds|guard"):
        Guard(**options)
