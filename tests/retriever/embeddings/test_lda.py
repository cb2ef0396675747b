import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from compose.errors import ComposeError
from compose.retriever.embeddings import Samples
from compose.retriever.embeddings.lda import Lda


def drawn(counts: list[int], dim: int = 6) -> Samples:
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(len(counts)), counts)
    vectors = generator.standard_normal((len(counts), dim))[owners] + generator.standard_normal((len(owners), dim))
    return Samples((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), owners)


@pytest.mark.parametrize("shrinkage", [0.1, 0.5, 1.0])
def test_it_is_scikit_learns_discriminant_analysis(shrinkage) -> None:
    samples = drawn([8] * 5)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=[0.2] * 5)
    theirs.fit(samples.vectors.astype(np.float64), samples.owners)
    queries = drawn([4] * 5).vectors
    expected = theirs.decision_function(queries.astype(np.float64)) - np.log(0.2)
    np.testing.assert_allclose(Lda(shrinkage=shrinkage).fit(samples).scores(queries), expected, rtol=1e-4, atol=1e-4)


def test_with_unequal_counts_it_is_the_likelihood_under_one_gaussian_each() -> None:
    samples = drawn([2, 9, 5])
    rows = samples.vectors.astype(np.float64)
    means = np.array([rows[samples.owners == e].mean(axis=0) for e in range(3)])
    centred = rows - means[samples.owners]
    covariance = centred.T @ centred / len(rows)
    covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / 6 * np.eye(6)
    queries = drawn([3, 3, 3]).vectors.astype(np.float64)
    gaps = queries[:, None] - means
    logs = -0.5 * np.einsum("bed,df,bef->be", gaps, np.linalg.inv(covariance), gaps)
    ours = Lda(shrinkage=0.2).fit(samples).scores(queries.astype(np.float32))
    np.testing.assert_allclose(ours - ours[:, :1], logs - logs[:, :1], rtol=1e-4, atol=1e-4)


def test_it_takes_out_a_direction_that_all_adapters_share() -> None:
    generator = np.random.default_rng(1)
    noise = np.array([[4.0, 0, 0]]) * generator.standard_normal((40, 1)) + 0.1 * generator.standard_normal((40, 3))
    vectors = noise + np.repeat([[0, 1.0, 0], [0, 0, 1.0]], 20, axis=0)
    samples = Samples(vectors.astype(np.float32), np.repeat([0, 1], 20))
    scores = Lda(shrinkage=0.01).fit(samples).scores(np.array([[9.0, 0.9, 0.1], [-9.0, 0.1, 0.9]], np.float32))
    assert scores.argmax(axis=1).tolist() == [0, 1]


@pytest.mark.parametrize("shrinkage", [0.0, -0.1, 1.1])
def test_shrinkage_has_a_range(shrinkage) -> None:
    with pytest.raises(ComposeError, match="shrinkage must lie in"):
        Lda(shrinkage=shrinkage)
