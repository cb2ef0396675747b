"""``kmeans``: a few centroids per adapter, by cosine; the closest one decides."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compose.errors import BackendUnavailableError, ComposeError
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples, cosine_vectors


@ADAPTER_EMBEDDINGS.register("kmeans")
@dataclass(frozen=True, kw_only=True)
class KMeans:
    """``max_j q . c_j / |c_j|`` over the centroids of scikit-learn's k-means, run per adapter.

    The cosine form of CoLoR's prototypes (arXiv:2311.17601), whose distance is Euclidean: that is ``color``. An
    adapter with fewer distinct samples than ``centroids`` keeps each of them.

    Attributes:
        centroids: Per adapter, at least 1.
        restarts: Of k-means; the best one counts.
        seed: Of its starting points, the same for every adapter, so that their order does not matter.
    """

    reads: ClassVar[Reads] = "examples"
    centroids: int = 5
    restarts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.centroids < 1 or self.restarts < 1:
            raise ComposeError(f"centroids and restarts must be at least 1, got {self.centroids}, {self.restarts}")

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return up to ``centroids`` unit vectors per adapter.

        Raises:
            BackendUnavailableError: scikit-learn is not installed.
        """
        if importlib.util.find_spec("sklearn") is None:
            raise BackendUnavailableError(
                "method 'kmeans' needs scikit-learn: pip install 'adapter-compose[retriever]', or take another method"
            )
        borders = np.concatenate([[0], np.cumsum(samples.counts)])
        groups = [self._centroids(samples.vectors[start:stop]) for start, stop in itertools.pairwise(borders)]
        owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        return cosine_vectors(np.concatenate(groups), owners)

    def _centroids(self, vectors: np.ndarray) -> np.ndarray:
        from sklearn.cluster import KMeans as SklearnKMeans

        distinct = np.unique(vectors, axis=0)
        if len(distinct) <= self.centroids:
            return distinct
        fitted = SklearnKMeans(self.centroids, n_init=self.restarts, random_state=self.seed).fit(vectors)
        return fitted.cluster_centers_
