import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from compose.errors import ComposeError
from compose.retriever.embeddings import Samples
from compose.retriever.embeddings.logistic import Logistic


def drawn(adapters: int) -> Samples:
    generator = np.random.default_rng(0)
    owners = np.repeat(np.arange(adapters), 6)
    vectors = generator.standard_normal((adapters, 5))[owners] + generator.standard_normal((len(owners), 5))
    return Samples((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), owners)


@pytest.mark.parametrize("adapters", [2, 4])
def test_probabilities_are_those_of_scikit_learn(adapters) -> None:
    samples = drawn(adapters)
    theirs = LogisticRegression(C=3.0, max_iter=2000, tol=1e-6).fit(samples.vectors, samples.owners)
    scores = Logistic(inverse_penalty=3.0).fit(samples).scores(samples.vectors)
    assert scores.shape == (len(samples.owners), adapters)
    exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = theirs.predict_proba(samples.vectors)
    np.testing.assert_allclose(exponents / exponents.sum(axis=1, keepdims=True), expected, atol=1e-3)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ComposeError, match="inverse_penalty must be above 0"):
        Logistic(inverse_penalty=0)
    with pytest.raises(ComposeError, match="needs two"):
        Logistic().fit(drawn(1))
