"""``logistic``: one linear model over all adapters, fitted to tell their samples apart."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compose.errors import BackendUnavailableError, ComposeError
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples


@ADAPTER_EMBEDDINGS.register("logistic")
@dataclass(frozen=True, kw_only=True)
class Logistic:
    """``q . w_e + b_e`` of scikit-learn's multinomial logistic regression with an L2 penalty.

    Iterative, and of all adapters at once: one adapter more fits every one anew, where the other methods add a row.
    The best for inputs like the samples, the worst for finding related adapters when the right one is not there
    (README).

    Attributes:
        inverse_penalty: ``C``, above 0: the larger, the closer to the samples.
    """

    reads: ClassVar[Reads] = "examples"
    inverse_penalty: float = 10.0

    def __post_init__(self) -> None:
        if not self.inverse_penalty > 0:
            raise ComposeError(f"inverse_penalty must be above 0, got {self.inverse_penalty}")

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return one vector and one bias per adapter.

        Raises:
            BackendUnavailableError: scikit-learn is not installed.
            ComposeError: There is one adapter only.
        """
        if importlib.util.find_spec("sklearn") is None:
            raise BackendUnavailableError(
                "method 'logistic' needs scikit-learn: pip install 'adapter-compose[retriever]', or take method 'lda'"
            )
        if len(samples.counts) < 2:
            raise ComposeError("method 'logistic' tells adapters apart, so it needs two; use method='mean'")
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=self.inverse_penalty, max_iter=2000, tol=1e-6).fit(
            samples.vectors.astype(np.float64), samples.owners
        )
        weights, bias = model.coef_, model.intercept_
        if len(samples.counts) == 2:  # one row, that of the second against the first
            weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
        owners = np.arange(len(weights))
        return AdapterVectors(weights.astype(np.float32), owners, bias.astype(np.float32), unit_queries=False)
