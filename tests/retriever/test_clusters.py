"""Clusters of texts: the groups that are there are found, kept on disk, and route to the adapters that lie in them."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from compose.errors import AdapterFormatError, BackendUnavailableError, IncompatibleError, UnknownNameError
from compose.retriever.clusters import Centres, ClusterRetriever, TextClusters, gaussians, kmeans
from compose.retriever.composition import Composer
from compose.retriever.retriever import Retriever
from compose.routers import MixedExample
from compose.text.examples import Example

THEMES = ("animals", "colours", "numbers", "verbs")


@dataclass(frozen=True)
class Themes:
    """An encoder: a text ``"<theme> <number>"`` lies near its theme's axis, the number says where."""

    prompt: str = ""
    id: str = "themes"
    fingerprint: str = "f" * 64
    dim: int = 6

    def encode(self, texts):
        rows = []
        for text in texts:
            theme, number = text.split()
            noise = np.random.default_rng(int(number)).standard_normal(self.dim) * 0.1
            row = np.eye(self.dim)[THEMES.index(theme)] + noise
            rows.append(row / np.linalg.norm(row))
        return np.array(rows, dtype=np.float32).reshape(-1, self.dim)


def texts_of(theme: str, count: int, start: int = 0) -> list[str]:
    return [f"{theme} {number}" for number in range(start, start + count)]


ALL = [text for theme in THEMES for text in texts_of(theme, 12)]


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_groups_are_found_and_new_texts_join_them(method) -> None:
    clusters = TextClusters.fit(Themes(), ALL, num_clusters=4, method=method, components=4)
    found = clusters.of(ALL).reshape(4, 12)
    assert found.dtype == np.int64
    assert all(len(set(row)) == 1 for row in found)
    assert len(set(found[:, 0])) == 4
    new = clusters.of([text for theme in THEMES for text in texts_of(theme, 5, start=100)]).reshape(4, 5)
    assert (new == found[:, :1]).all()


def test_the_same_seed_gives_the_same_clusters_and_assignment_is_by_the_nearest_centre() -> None:
    vectors = Themes().encode(ALL)
    first, again = kmeans(vectors, 6, seed=3), kmeans(vectors, 6, seed=3)
    np.testing.assert_array_equal(first, again)
    distances = ((vectors[:, None].astype(np.float64) - first[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(Centres(first).assign(vectors), distances.argmin(1))
    assert Centres(np.zeros((3, 2), np.float32)).assign(np.ones((2, 2))).tolist() == [0, 0]


def test_gaussians_assign_as_scikit_learn_does() -> None:
    vectors = Themes().encode(ALL)
    fitted = gaussians(vectors, 4, components=3, seed=0)
    assert fitted.components.shape == (3, 6)
    x = (vectors.astype(np.float64) - fitted.mean) @ fitted.components.T.astype(np.float64)
    oracle = GaussianMixture(4)
    oracle.means_, oracle.precisions_cholesky_ = fitted.means, fitted.factors
    log_determinants = np.log(np.diagonal(fitted.factors, axis1=1, axis2=2)).sum(1)
    oracle.weights_ = np.exp(fitted.logs - log_determinants)
    np.testing.assert_array_equal(fitted.assign(vectors), oracle.predict(x))
    assert len(set(fitted.assign(vectors))) == 4


@pytest.mark.parametrize("method", ["kmeans", "gmm"])
def test_saved_clusters_number_texts_as_before(method, tmp_path) -> None:
    clusters = TextClusters.fit(Themes(), ALL, num_clusters=4, method=method, components=4)
    clusters.save(tmp_path / "clusters")
    loaded = TextClusters.load(tmp_path / "clusters", Themes())
    assert type(loaded.clusters) is type(clusters.clusters)
    for mine, kept in zip(clusters.clusters, loaded.clusters, strict=True):
        np.testing.assert_array_equal(mine, kept)
    np.testing.assert_array_equal(loaded.of(ALL), clusters.of(ALL))


def test_clusters_of_another_encoder_or_prompt_are_refused(tmp_path) -> None:
    TextClusters.fit(Themes(), ALL, num_clusters=4).save(tmp_path / "clusters")
    for other in (Themes(prompt="Cluster: "), Themes(fingerprint="0" * 64)):
        with pytest.raises(IncompatibleError, match="themes"):
            TextClusters.load(tmp_path / "clusters", other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2"),
        ({"method": "spectral"}, "'spectral'"),
        ({"method": "gmm"}, "wanted float32"),
        ({"clusters": 5}, "wanted float32"),
        ({"clusters": "4"}, "whole number"),
        ({"encoder": None}, "an object"),
    ],
)
def test_damaged_clusters_are_refused(change, words, tmp_path: Path) -> None:
    folder = TextClusters.fit(Themes(), ALL, num_clusters=4).save(tmp_path / "clusters")
    about = json.loads((folder / "clusters.json").read_text())
    (folder / "clusters.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(AdapterFormatError, match=words):
        TextClusters.load(folder, Themes())


def test_a_folder_without_clusters_is_refused(tmp_path) -> None:
    with pytest.raises(AdapterFormatError, match=r"no clusters\.json"):
        TextClusters.load(tmp_path, Themes())


def test_records_of_routers_are_numbered() -> None:
    clusters = TextClusters.fit(Themes(), ALL, num_clusters=4)
    records = [MixedExample(Example(text, "out"), "task", expert="e") for text in ALL[::12]]
    numbered = clusters.number(records)
    assert [record.cluster for record in numbered] == clusters.of(ALL[::12]).tolist()
    assert [replace(record, cluster=None) for record in numbered] == records


def test_an_adapter_scores_the_share_of_its_texts_in_the_querys_cluster() -> None:
    examples = {
        "animals": texts_of("animals", 10),
        "both": [*texts_of("animals", 3, start=50), *texts_of("colours", 9, start=50)],
        "numbers": texts_of("numbers", 10),
    }
    retriever = ClusterRetriever.fit(Themes(), examples, num_clusters=3)
    found = retriever.scores(["animals 200", "colours 200", "numbers 200"])
    np.testing.assert_allclose(found, [[1, 0.25, 0], [0, 0.75, 0], [0, 0, 1]])
    top = retriever.top(["animals 200", "animals 200"], 2, [None, ["animals"]])
    assert top.names == (("animals", "both"), ("both", "numbers"))
    assert top.rejected.tolist() == [False, False]
    assert retriever.top(["animals 200"], 9, [["animals", "both", "numbers"]]).names == ((),)


def test_adapter_soup_by_clusters_takes_the_adapters_of_the_clusters_that_a_corpus_hits_most() -> None:
    examples = {theme: texts_of(theme, 10) for theme in THEMES}
    retriever = ClusterRetriever.fit(Themes(), examples, num_clusters=4, method="gmm", components=4)
    corpus = [*texts_of("verbs", 6, start=100), *texts_of("colours", 3, start=100), "animals 100"]
    found = Composer(mode="soup", k=5, threshold=0.15)(retriever, corpus)
    assert found.rows() == [{"verbs": 0.5, "colours": 0.5}] * 10
    np.testing.assert_allclose(found.scores[0, :2], [0.6, 0.3], rtol=1e-6)


def test_adapter_soup_by_cosine_is_the_mean_over_all_pairs_of_texts() -> None:
    """With unit vectors, the mean over queries of ``q . mean(x)`` (``raw_mean``) is the mean cosine of all pairs."""
    examples = {theme: texts_of(theme, 5) for theme in THEMES}
    corpus = [*texts_of("verbs", 4, start=100), "numbers 100"]
    found = Composer(mode="soup", k=2)(Retriever.fit(Themes(), examples, "raw_mean"), corpus)
    queries, encoder = Themes().encode(corpus).astype(np.float64), Themes()
    by_hand = {theme: float((queries @ encoder.encode(own).T).mean()) for theme, own in examples.items()}
    assert list(found.rows()[0]) == sorted(by_hand, key=by_hand.__getitem__, reverse=True)[:2] == ["verbs", "numbers"]
    np.testing.assert_allclose(found.scores[0], [by_hand["verbs"], by_hand["numbers"]], rtol=1e-6)


def test_color_ranks_by_the_distance_to_the_nearest_prototype() -> None:
    examples = {
        "two": [*texts_of("animals", 8), *texts_of("verbs", 8)],
        "colours": texts_of("colours", 8),
        "one": ["numbers 1"],
    }
    retriever = Retriever.fit(Themes(), examples, "color")
    queries = ["animals 99", "verbs 99", "colours 99", "numbers 99"]
    assert [row[0] for row in retriever.top(queries, 1).names] == ["two", "two", "colours", "one"]
    vectors, fitted = Themes().encode(queries).astype(np.float64), retriever.fitted
    assert np.bincount(fitted.owners).tolist() == [5, 5, 1]
    squares = ((vectors[:, None] - fitted.vectors.astype(np.float64)) ** 2).sum(-1)
    nearest = np.minimum.reduceat(squares, fitted.starts, axis=1)
    np.testing.assert_allclose(retriever.scores(queries), (1 - nearest) / 2, atol=1e-6)  # |q - p|² = 1 - 2 q.p + p.p


@pytest.mark.parametrize("count", [0, 49])
def test_more_clusters_than_different_texts_are_refused(count) -> None:
    with pytest.raises(IncompatibleError, match=rf"\[1, 48\].*got {count}"):
        TextClusters.fit(Themes(), [*ALL, *ALL], num_clusters=count)


def test_bad_calls_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown clustering method 'dbscan'"):
        TextClusters.fit(Themes(), ALL, method="dbscan")
    with pytest.raises(IncompatibleError, match="adapter 'b' has no texts"):
        ClusterRetriever.fit(Themes(), {"a": ["animals 1"], "b": []})
    with pytest.raises(IncompatibleError, match="there are no adapters"):
        ClusterRetriever.fit(Themes(), {})


def test_without_scikit_learn_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'adapter-compose\[retriever\]'"):
        TextClusters.fit(Themes(), ALL, num_clusters=2)
