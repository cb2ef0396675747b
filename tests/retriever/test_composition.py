"""Composition per input: which adapters a row gets and at what weight, worked out by hand."""

import math
from typing import NamedTuple

import numpy as np
import pytest

from compose.errors import IncompatibleError, UnknownNameError
from compose.retriever.composition import MODES, Composer, allowed, first_of
from compose.retriever.retriever import Retriever

NAMES = ("a", "b", "c", "d")
SCORES = {
    "first": [0.9, 0.5, 0.7, 0.1],
    "second": [0.2, 0.8, 0.1, 0.6],
    "nothing": [-0.5, -0.1, -0.3, -0.2],
    "equal": [0.4, 0.4, 0.4, 0.4],
}


class Found(NamedTuple):
    names: list
    indices: np.ndarray
    scores: np.ndarray


class Table:
    """A retriever that reads scores from a table and counts how often it is asked."""

    names = NAMES

    def __init__(self) -> None:
        self.calls = 0

    def scores(self, texts):
        self.calls += 1
        return np.array([SCORES[text] for text in texts], dtype=np.float32)

    def top(self, texts, k, exclude=None):
        masked = np.where(allowed(NAMES, len(texts), exclude), self.scores(texts), -np.inf)
        indices, scores = first_of(masked, k)
        return Found([], indices, scores)


def rows(*texts, exclude=None, **options):
    return Composer(**options)(Table(), texts, exclude).rows()


def test_selection_is_the_first_at_full_strength() -> None:
    assert rows("first", "second") == [{"a": 1.0}, {"b": 1.0}]
    assert rows("first", k=None) == [{"a": 1.0}]


@pytest.mark.parametrize("mode", ["fusion", "mixture"])
def test_the_first_k_share_equally(mode) -> None:
    third = float(np.float32(1 / 3))
    assert rows("first", "second", mode=mode) == [dict.fromkeys("acb", third), dict.fromkeys("bda", third)]
    assert rows("first", mode=mode, k=1) == [{"a": 1.0}]
    assert rows("first", mode=mode, k=None) == [dict.fromkeys("acbd", 0.25)]
    assert rows("first", mode=mode, k=9) == rows("first", mode=mode, k=None)


def test_similarity_is_a_softmax_of_the_kept_scores_alone() -> None:
    found = Composer(mode="mixture", k=2, weights="similarity", temperature=0.1)(Table(), ["first", "second"])
    for weights, gap in zip(found.weights, (0.2, 0.2), strict=True):
        first = 1 / (1 + math.exp(-gap / 0.1))
        np.testing.assert_allclose(weights, [first, 1 - first], rtol=1e-6)
    cold = Composer(mode="mixture", k=None, weights="similarity", temperature=1e-4)(Table(), ["first"])
    np.testing.assert_allclose(cold.weights, [[1, 0, 0, 0]], atol=1e-12)
    warm = Composer(mode="mixture", k=None, weights="similarity", temperature=1e6)(Table(), ["first"])
    np.testing.assert_allclose(warm.weights, [[0.25] * 4], rtol=1e-5)


def test_equal_scores_keep_the_retrievers_order() -> None:
    assert list(rows("equal", mode="mixture", k=2)[0]) == ["a", "b"]


def test_what_scores_less_than_the_threshold_is_not_used_and_the_rest_still_sums_to_one() -> None:
    assert rows("first", "nothing", threshold=0.0) == [{"a": 1.0}, {}]
    found = Composer(mode="mixture", threshold=0.6)(Table(), ["first", "second", "nothing", "equal"])
    assert found.rows() == [{"a": 0.5, "c": 0.5}, {"b": 0.5, "d": 0.5}, {}, {}]
    assert found.weights.sum(1).tolist() == [1, 1, 0, 0]
    assert found.indices.tolist() == [[0, 2, -1], [1, 3, -1], [-1, -1, -1], [-1, -1, -1]]
    assert np.isneginf(found.scores[2:]).all()
    similar = Composer(mode="mixture", threshold=0.6, weights="similarity", temperature=0.05)
    assert similar(Table(), ["nothing", "second"]).weights.sum(1).tolist() == pytest.approx([0, 1])
    assert rows("first", threshold=0.9 + 1e-6) == [{}]  # a score is a float32: 0.9 is not below 0.9
    assert rows("first", threshold=float(np.float32(0.9))) == [{"a": 1.0}]


def test_excluded_adapters_leave_their_place_to_the_next() -> None:
    assert rows("first", "first", exclude=["a", None]) == [{"c": 1.0}, {"a": 1.0}]
    assert rows("first", "second", mode="mixture", k=2, exclude=[["a", "c"], []]) == [
        {"b": 0.5, "d": 0.5},
        {"b": 0.5, "d": 0.5},
    ]
    assert rows("first", mode="mixture", k=3, exclude=[["a", "c", "b"]]) == [{"d": 1.0}]
    assert rows("first", exclude=[list("abcd")]) == [{}]


def test_soup_gives_every_row_the_best_of_the_mean() -> None:
    # means over the two: a .55, b .65, c .40, d .35
    assert rows("first", "second", mode="soup", k=2) == [{"b": 0.5, "a": 0.5}] * 2
    assert rows("first", "second", mode="soup", k=2, threshold=0.6) == [{"b": 1.0}] * 2
    assert rows("first", "second", mode="soup", k=2, exclude=["b", None]) == [
        {"a": 0.5, "c": 0.5},
        {"b": 0.5, "a": 0.5},
    ]


def test_what_a_calibrated_retriever_refuses_gets_no_adapter(words, tasks) -> None:
    inside = {name: texts[:5] for name, texts in tasks.items()}
    retriever = Retriever.fit(words, inside, "mean").calibrated(
        [texts[5] for texts in tasks.values()], ["quantum chromodynamics lattice", "green ideas sleep furiously"]
    )
    texts = ["is it rain or snow", "colourless green ideas", "send my money"]
    for mode in ("selection", "mixture"):
        found = Composer(mode=mode, k=2)(retriever, texts).rows()
        assert [next(iter(row), None) for row in found] == ["weather", None, "money"]


def test_modes_say_what_is_summed_and_ask_the_retriever_once() -> None:
    for mode in MODES:
        table = Table()
        found = Composer(mode=mode)(table, ["first"] * 3)
        assert found.combine == ("parameters" if mode in ("fusion", "soup") else "outputs")
        assert table.calls == 1
        assert found.indices.dtype == np.int64
        assert found.weights.dtype == found.scores.dtype == np.float32


def test_rows_do_not_depend_on_their_neighbours() -> None:
    texts = ["first", "nothing", "second", "first"]
    for options in ({}, {"mode": "fusion"}, {"mode": "mixture", "weights": "similarity", "threshold": -0.15}):
        together = rows(*texts, **options)
        assert together == [rows(text, **options)[0] for text in texts]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"mode": "mix"}, UnknownNameError, "unknown mode 'mix'"),
        ({"weights": "equal"}, UnknownNameError, "unknown weights 'equal'"),
        ({"k": 0}, IncompatibleError, "k must be a whole number"),
        ({"k": True}, IncompatibleError, "k must be a whole number"),
        ({"k": 2.0}, IncompatibleError, "k must be a whole number"),
        ({"temperature": 0.0}, IncompatibleError, "temperature must be a positive number, got 0"),
        ({"temperature": math.nan}, IncompatibleError, "temperature"),
        ({"temperature": math.inf}, IncompatibleError, "temperature"),
        ({"threshold": math.nan}, IncompatibleError, "threshold"),
    ],
)
def test_bad_options_are_refused(options, error, words) -> None:
    with pytest.raises(error, match=words):
        Composer(**options)


def test_bad_calls_are_refused() -> None:
    for texts in ([], "first"):
        with pytest.raises(IncompatibleError, match="list of at least one text"):
            Composer()(Table(), texts)
    with pytest.raises(UnknownNameError, match="unknown adapter 'e'"):
        Composer(mode="soup")(Table(), ["first"], ["e"])
    for exclude in ("a", ["a"]):
        with pytest.raises(IncompatibleError, match="one entry for each of the 2 texts"):
            Composer(mode="soup")(Table(), ["first", "first"], exclude)


def test_scores_that_are_no_numbers_are_refused(monkeypatch) -> None:
    monkeypatch.setitem(SCORES, "bad", [0.1, math.nan, 0.0, 0.0])
    for mode in MODES:
        with pytest.raises(IncompatibleError, match="not numbers"):
            Composer(mode=mode, k=None if mode != "selection" else 1)(NanFirst(), ["bad"])


class NanFirst(Table):
    """Names the adapter whose score is no number first."""

    def top(self, texts, k, exclude=None):
        return Found([], np.array([[1]]), np.array([[math.nan]]))
