"""Laws over all adapter embeddings that read texts, and what a retriever adds to them."""

import re

import numpy as np
import pytest

from compose.errors import ComposeError, UnknownNameError
from compose.fewshot.preselect import preselect_by_ranker
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS
from compose.retriever.retriever import Retriever
from compose.text.examples import Example

METHODS = [name for name in ADAPTER_EMBEDDINGS if ADAPTER_EMBEDDINGS[name].reads != "factors"]
QUERIES = ["rain in rome today", "pay the bill", "cook bread and rice"]


@pytest.mark.parametrize("method", METHODS)
def test_the_right_adapter_comes_first(method, words, tasks) -> None:
    retriever = Retriever.fit(words, tasks, method)
    found = retriever.top(QUERIES, k=2)
    assert [row[0] for row in found.names] == ["weather", "money", "food"]
    scores = retriever.scores(QUERIES)
    assert scores.shape == (3, 4)
    assert scores.dtype == found.scores.dtype == np.float32
    np.testing.assert_array_equal(np.take_along_axis(scores, found.indices, axis=1), found.scores)
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert not found.rejected.any()


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_does_not_matter(method, words, tasks) -> None:
    forward = Retriever.fit(words, tasks, method)
    backward = Retriever.fit(words, dict(reversed(tasks.items())), method)
    np.testing.assert_allclose(backward.scores(QUERIES)[:, ::-1], forward.scores(QUERIES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_query_is_scored_as_alone(method, words, tasks) -> None:
    retriever = Retriever.fit(words, tasks, method)
    alone = np.concatenate([retriever.scores([text]) for text in QUERIES])
    np.testing.assert_allclose(retriever.scores(QUERIES), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_each_is_enough_or_refused_in_words(method, words) -> None:
    single = {"rain": ["rain"], "bill": ["bill"]}
    if method == "lda":
        with pytest.raises(ComposeError, match="method='mean'"):
            Retriever.fit(words, single, method)
        return
    assert Retriever.fit(words, single, method).top(["a bill"], 1).names == (("bill",),)


@pytest.mark.parametrize("backend", ["exact", "numpy", "sklearn", "faiss"])
@pytest.mark.parametrize("method", METHODS)
def test_backends_find_what_all_scores_say(method, backend, words, tasks) -> None:
    exact = Retriever.fit(words, tasks, method, backend="exact").top(QUERIES, 3, exclude=["weather", None, "food"])
    found = Retriever.fit(words, tasks, method, backend=backend).top(QUERIES, 3, exclude=["weather", None, "food"])
    assert found.names == exact.names
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-4, atol=1e-4)


def test_a_backend_is_asked_again_until_enough_adapters_are_found(words) -> None:
    crowded = {"many": [f"rain {n}" for n in range(60)], **{f"other {n}": [f"bread {n}"] for n in range(30)}}
    exact = Retriever.fit(words, crowded, "nearest", backend="exact").top(["rain"], 2)
    assert Retriever.fit(words, crowded, "nearest", backend="numpy").top(["rain"], 2).names == exact.names
    assert len(exact.names[0]) == 2


def test_auto_takes_lda_from_five_samples_on(words, tasks) -> None:
    assert type(Retriever.fit(words, tasks).method) is ADAPTER_EMBEDDINGS["lda"]
    few = {name: texts[: 4 if name == "food" else 6] for name, texts in tasks.items()}
    assert type(Retriever.fit(words, few).method) is ADAPTER_EMBEDDINGS["mean"]
    assert type(Retriever.fit(words, {"food": tasks["food"]}).method) is ADAPTER_EMBEDDINGS["mean"]


def test_exclusions_are_per_row_and_leave_minus_one_where_too_few_are_left(words, tasks) -> None:
    retriever = Retriever.fit(words, tasks)
    found = retriever.top(QUERIES, k=9, exclude=["weather", None, ["food", "money", "food"]])
    assert found.indices.shape == (3, 4)
    assert [set(tasks) - set(row) for row in found.names] == [{"weather"}, set(), {"food", "money"}]
    assert (found.indices == -1).sum(axis=1).tolist() == [1, 0, 2]
    assert np.isneginf(found.scores[found.indices == -1]).all()
    unrestricted = retriever.top(QUERIES, k=4)
    assert found.names[0] == tuple(name for name in unrestricted.names[0] if name != "weather")


def test_equal_adapters_stand_in_their_order(words) -> None:
    same = {"b": ["rain"], "a": ["rain"], "c": ["bread"], "d": ["rain"]}
    assert Retriever.fit(words, same, "mean").top(["rain"], 2).names == (("b", "a"),)


def test_a_task_is_retrieved_by_the_mean_of_its_queries(words, tasks) -> None:
    lda = Retriever.fit(words, tasks, "lda")
    found = lda.top_for_task(QUERIES, 4)
    np.testing.assert_allclose(
        lda.scores(QUERIES).mean(axis=0)[found.indices[0]], found.scores[0], rtol=1e-4, atol=1e-4
    )
    mean = Retriever.fit(words, tasks, "mean")
    centre = words.encode(QUERIES).mean(axis=0)
    expected = mean.fitted.vectors @ (centre / np.linalg.norm(centre))
    np.testing.assert_allclose(np.sort(expected)[::-1], mean.top_for_task(QUERIES, 4).scores[0], rtol=1e-5)


def test_the_ranker_preselects_for_few_shot_search(words, tasks) -> None:
    examples = [Example("will it rain", "yes"), Example("sun today", "no")]
    retriever = Retriever.fit(words, tasks)
    assert retriever.ranker()(examples)[0] == "weather"
    bank = ("food", "weather", "music")
    assert "weather" in preselect_by_ranker(bank, 2, retriever.ranker(bank), examples).names
    assert set(retriever.ranker(bank)(examples)) == set(bank)
    with pytest.raises(UnknownNameError, match="'wether'; did you mean 'weather'"):
        retriever.ranker(["wether"])


def test_vectors_made_earlier_give_the_same_retriever_in_any_order(words, tasks) -> None:
    texts = [text for group in tasks.values() for text in group]
    owners = np.repeat(np.arange(4), 6)
    mixed = np.random.default_rng(0).permutation(24)
    made = Retriever.from_vectors(words, list(tasks), words.encode(texts)[mixed], owners[mixed])
    np.testing.assert_allclose(made.scores(QUERIES), Retriever.fit(words, tasks).scores(QUERIES), rtol=1e-4)


@pytest.mark.parametrize(
    ("examples", "message"),
    [({}, "no adapters"), ({"a": []}, "none for ['a']"), ({"a": [1]}, "must be a string"), ({"a": "rain"}, "list")],
)
def test_what_cannot_be_embedded_is_refused(examples, message, words) -> None:
    with pytest.raises(ComposeError, match=re.escape(message)):
        Retriever.fit(words, examples)


def test_wrong_calls_are_refused(words, tasks) -> None:
    retriever = Retriever.fit(words, tasks)
    with pytest.raises(UnknownNameError, match="did you mean 'lda'"):
        Retriever.fit(words, tasks, "ldaa")
    with pytest.raises(UnknownNameError, match="unknown vector backend"):
        Retriever.fit(words, tasks, backend="fais").top(QUERIES)
    with pytest.raises(ComposeError, match="k must be at least 1"):
        retriever.top(QUERIES, 0)
    with pytest.raises(ComposeError, match="one entry for each of the 3 texts"):
        retriever.top(QUERIES, 1, exclude=["food"])
    with pytest.raises(UnknownNameError, match="'foods'; did you mean 'food'"):
        retriever.top(QUERIES, 1, exclude=["foods", None, None])
    with pytest.raises(ComposeError, match=re.escape("(B, 24), got (3, 5)")):
        retriever.top_vectors(np.zeros((3, 5), np.float32))
    with pytest.raises(ComposeError, match="at least one text"):
        retriever.top_for_task([])


@pytest.mark.parametrize(
    ("names", "vectors", "owners", "message"),
    [
        (["a", "a"], np.ones((2, 24)), [0, 1], "distinct"),
        (["a", ""], np.ones((2, 24)), [0, 1], "none empty"),
        (["a", "b"], np.ones((2, 24)), [0, 0], "without a vector: [1]"),
        (["a"], np.ones((2, 24)), [0, 1], "indices of the 1 names"),
        (["a"], np.full((1, 24), np.nan), [0], "finite"),
        (["a"], np.ones((2, 24)), [0], "one owner each"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(names, vectors, owners, message, words) -> None:
    with pytest.raises(ComposeError, match=re.escape(message)):
        Retriever.from_vectors(words, names, vectors, np.array(owners))
