import numpy as np
import pytest

from compose.errors import ComposeError
from compose.retriever.retriever import Retriever
from compose.retriever.scope import Scope, calibrate, scope_scores

INSIDE = ["rain today", "pay the bank", "play my song", "cook bread", "bank bill", "hot soup", "snow in rome", "jazz"]
OUTSIDE = ["zebra stripes", "quantum foam", "tax law", "goal keeper"]


def test_distances_are_those_of_the_gaussians(words, tasks) -> None:
    fitted = Retriever.fit(words, tasks, "lda").fitted
    samples = words.encode([text for group in tasks.values() for text in group]).astype(np.float64)
    means = samples.reshape(4, 6, -1).mean(axis=1)
    within = (samples.reshape(4, 6, -1) - means[:, None]).reshape(24, -1)

    def inverse(centred: np.ndarray) -> np.ndarray:
        covariance = centred.T @ centred / 24
        return np.linalg.inv(0.85 * covariance + 0.15 * np.trace(covariance) / 24 * np.eye(24))

    queries = words.encode(INSIDE).astype(np.float64)
    precision, background = inverse(within), inverse(samples - samples.mean(axis=0))
    gaps = queries[:, None] - means[None]
    near = np.einsum("bed,df,bef->be", gaps, precision, gaps).min(axis=1)
    far = np.einsum("bd,df,bf->b", queries - samples.mean(axis=0), background, queries - samples.mean(axis=0))
    measured = words.encode(INSIDE)
    np.testing.assert_allclose(scope_scores(fitted, measured, "mahalanobis"), -near, rtol=1e-4)
    np.testing.assert_allclose(scope_scores(fitted, measured, "relative"), far - near, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("method", ["mean", "lda"])
def test_texts_of_no_task_are_refused_and_get_no_adapter(method, words, tasks) -> None:
    retriever = Retriever.fit(words, tasks, method).calibrated(INSIDE, OUTSIDE)
    assert retriever.scope is not None
    assert retriever.scope.kind == ("relative" if method == "lda" else "score")
    found = retriever.top(["rain today", "zebra stripes"], 2)
    assert found.rejected.tolist() == [False, True]
    assert found.names[0][0] == "weather"
    assert found.names[1] == ()
    assert (found.indices[1] == -1).all()
    assert np.isneginf(found.scores[1]).all()
    assert len(retriever.top_for_task(["zebra stripes"], 2).names[0]) == 2


def test_the_wanted_share_is_kept(words, tasks) -> None:
    fitted = Retriever.fit(words, tasks, "mean").fitted
    queries = words.encode(INSIDE)
    for keep, kept in ((1.0, 8), (0.75, 6), (0.5, 4), (0.01, 1)):
        scope = calibrate(fitted, queries, None, keep=keep, kind=None)
        assert (scope_scores(fitted, queries, "score") >= scope.threshold).sum() == kept
        assert scope.kept == kept / 8


def test_with_both_kinds_of_text_no_threshold_does_better(words, tasks) -> None:
    fitted = Retriever.fit(words, tasks, "mean").fitted
    inside, outside = words.encode(INSIDE), words.encode([*OUTSIDE, "rain of zebra"])
    scope = calibrate(fitted, inside, outside, keep=0.95, kind="score")
    inner, outer = scope_scores(fitted, inside, "score"), scope_scores(fitted, outside, "score")
    assert scope == Scope("score", scope.threshold, float((inner >= scope.threshold).mean()), scope.refused)
    assert scope.refused == float((outer < scope.threshold).mean())
    every = [(inner >= t).mean() + (outer < t).mean() for t in np.linspace(-1, 1, 2001)]
    assert scope.kept + scope.refused >= max(every)


def test_wrong_calls_are_refused(words, tasks) -> None:
    mean = Retriever.fit(words, tasks, "mean")
    with pytest.raises(ComposeError, match="only method 'lda' has"):
        mean.calibrated(INSIDE, kind="mahalanobis")
    with pytest.raises(ComposeError, match="one of score, mahalanobis, relative"):
        mean.calibrated(INSIDE, kind="cosine")
    with pytest.raises(ComposeError, match="keep must lie in"):
        mean.calibrated(INSIDE, keep=0)
    with pytest.raises(ComposeError, match="needs texts"):
        mean.calibrated([])
    with pytest.raises(ComposeError, match="needs texts"):
        mean.calibrated(INSIDE, [])
