"""``lda``: linear discriminants with one covariance for all adapters, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compose.errors import ComposeError
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Moments, Reads, Samples

_CHUNK = 65536
_NO_VARIANCE = 1e-12
"""Of unit vectors, per entry; what rounding leaves of none."""


@ADAPTER_EMBEDDINGS.register("lda")
@dataclass(frozen=True, kw_only=True)
class Lda:
    """``q . P m_e - m_e . P m_e / 2`` with ``P`` the inverse of the shrunk covariance within adapters.

    The covariance ``S`` is that of the samples around their adapter's mean ``m_e``, every sample counting the same,
    divided by the number of samples; it is shrunk to ``(1 - a) S + a trace(S) / D I``. All adapters are equally likely
    beforehand. With equally many samples per adapter this is scikit-learn's
    ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=a)``. Scores are logarithms of likelihoods up to a term of
    the query: they rank the adapters of one query, the distance of `compose.retriever.scope` compares queries.

    Attributes:
        shrinkage: ``a`` in (0, 1].
    """

    reads: ClassVar[Reads] = "examples"
    shrinkage: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.shrinkage <= 1:
            raise ComposeError(f"shrinkage must lie in (0, 1], got {self.shrinkage}")

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return one vector and one bias per adapter, and the moments.

        Raises:
            ComposeError: The samples do not vary within the adapters: then there is no covariance.
        """
        means = samples.means()
        centre = samples.vectors.mean(axis=0, dtype=np.float64)
        second = _second_moment(samples.vectors)
        between = (means.T * samples.counts / len(samples.vectors)) @ means
        precision = _inverse(_shrunk(second - between, self.shrinkage))
        background = _inverse(_shrunk(second - np.outer(centre, centre), self.shrinkage))
        directions = means @ precision
        bias = -0.5 * np.einsum("ed,ed->e", directions, means)
        moments = Moments(*(part.astype(np.float32) for part in (precision, centre, background)))
        return AdapterVectors(
            directions.astype(np.float32),
            np.arange(len(means)),
            bias.astype(np.float32),
            unit_queries=False,
            moments=moments,
        )


def _second_moment(vectors: np.ndarray) -> np.ndarray:
    """``(N, D)`` -> ``(D, D)`` float64, the mean of ``x x^T``; chunk by chunk, since float64 takes twice the space."""
    total = np.zeros((vectors.shape[1], vectors.shape[1]))
    for start in range(0, len(vectors), _CHUNK):
        chunk = vectors[start : start + _CHUNK].astype(np.float64)
        total += chunk.T @ chunk
    return total / len(vectors)


def _shrunk(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
    scale = float(np.trace(covariance)) / len(covariance)
    if scale <= _NO_VARIANCE:
        raise ComposeError(
            "lda needs adapters whose samples differ from each other; every adapter has one sample or equal ones. "
            "Give more samples, or use method='mean'"
        )
    return (1 - shrinkage) * covariance + shrinkage * scale * np.eye(len(covariance))


def _inverse(covariance: np.ndarray) -> np.ndarray:
    from scipy.linalg import cho_factor, cho_solve

    return cho_solve(cho_factor(covariance, lower=True), np.eye(len(covariance)))
