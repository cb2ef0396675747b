import numpy as np

from compose.retriever.vectors.unit_space import unit_queries, unit_vectors


def test_cosines_rank_like_inner_products_with_a_bias() -> None:
    generator = np.random.default_rng(0)
    vectors, bias = generator.normal(0, 30, (50, 6)).astype(np.float32), generator.normal(0, 90, 50).astype(np.float32)
    queries = generator.normal(0, 2, (7, 6)).astype(np.float32)
    rows, asked = unit_vectors(vectors, bias), unit_queries(queries)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-6)
    scores, cosines = queries @ vectors.T + bias, asked @ rows.T
    longest = np.sqrt((vectors**2).sum(axis=1) + bias**2).max()
    lengths = np.sqrt((queries**2).sum(axis=1) + 1)
    np.testing.assert_allclose(cosines * longest * lengths[:, None], scores, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(np.argsort(-cosines, axis=1), np.argsort(-scores, axis=1))


def test_unit_vectors_without_a_bias_keep_their_cosines() -> None:
    vectors = np.eye(4, dtype=np.float32)
    rows = unit_vectors(vectors, np.zeros(4, np.float32))
    np.testing.assert_allclose(rows[:, :4], vectors, atol=1e-6)
    np.testing.assert_allclose(rows[:, 4:], 0, atol=1e-3)
