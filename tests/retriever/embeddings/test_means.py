"""The embeddings that need no fitting, on vectors worked out by hand."""

import numpy as np

from compose.retriever.embeddings import Samples
from compose.retriever.embeddings.description import Description
from compose.retriever.embeddings.kmeans import KMeans
from compose.retriever.embeddings.mean import Mean
from compose.retriever.embeddings.nearest import Nearest
from compose.retriever.embeddings.raw_mean import RawMean

DIVERSE = [[1.0, 0, 0], [0, 1.0, 0]]  # mean (1/2, 1/2, 0), length 1/sqrt(2)
NARROW = [[0, 0.6, 0.8], [0, 0.6, 0.8]]  # mean of length 1
SAMPLES = Samples(np.array(DIVERSE + NARROW, np.float32), np.array([0, 0, 1, 1]))
QUERY = np.array([[0.6, 0.8, 0]], np.float32)


def test_the_mean_is_renormalised() -> None:
    for method in (Mean(), Description()):
        np.testing.assert_allclose(method.fit(SAMPLES).scores(QUERY), [[1.4 / np.sqrt(2), 0.48]], rtol=1e-6)


def test_the_raw_mean_punishes_diverse_adapters() -> None:
    np.testing.assert_allclose(RawMean().fit(SAMPLES).scores(QUERY), [[0.7, 0.48]], rtol=1e-6)
    closer = np.array([[0.5, 0.7, 0.5]], np.float32)
    assert RawMean().fit(SAMPLES).scores(closer).argmax() == 1
    assert Mean().fit(SAMPLES).scores(closer).argmax() == 0


def test_many_queries_are_scored_in_turns(monkeypatch) -> None:
    fitted = Nearest().fit(SAMPLES)
    queries = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    whole = fitted.scores(queries)
    monkeypatch.setattr("compose.retriever.embeddings._SCORES", 8)
    np.testing.assert_allclose(fitted.scores(queries), whole, rtol=1e-6)


def test_the_nearest_sample_decides() -> None:
    fitted = Nearest().fit(SAMPLES)
    np.testing.assert_allclose(fitted.scores(QUERY), [[0.8, 0.48]], rtol=1e-6)
    np.testing.assert_allclose(fitted.scores_of(QUERY[0], np.array([1, 0])), [0.48, 0.8], rtol=1e-6)


def test_centroids_are_those_of_the_clusters() -> None:
    generator = np.random.default_rng(0)
    corners = np.eye(3).repeat(10, axis=0) + 0.05 * generator.standard_normal((30, 3))
    unit = (corners / np.linalg.norm(corners, axis=1, keepdims=True)).astype(np.float32)
    fitted = KMeans(centroids=3).fit(Samples(unit, np.zeros(30, np.int64)))
    order = fitted.vectors.argmax(axis=1).argsort()
    means = unit.reshape(3, 10, 3).mean(axis=1)
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(fitted.vectors[order], expected, atol=1e-5)


def test_few_distinct_samples_are_kept_as_they_are() -> None:
    fitted = KMeans(centroids=5).fit(SAMPLES)
    assert fitted.owners.tolist() == [0, 0, 1]
    np.testing.assert_allclose(fitted.scores(QUERY), [[0.8, 0.48]], rtol=1e-6)
