"""``color``: the nearest of a few k-means prototypes per adapter decides, as in CoLoR (arXiv:2311.17601)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compose.errors import IncompatibleError
from compose.retriever.clusters import kmeans
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples


@ADAPTER_EMBEDDINGS.register("color")
@dataclass(frozen=True, kw_only=True)
class Color:
    """``max_p q . p - p . p / 2`` over an adapter's prototypes: for unit queries the order of ``-|q - p|²``.

    CoLoR clusters frozen image features of every domain; here they are the vectors of an adapter's texts. An adapter
    with fewer different vectors than prototypes has one prototype for each of them.

    Attributes:
        prototypes: Per adapter, at most. CoLoR's 5 is recalled from the paper, not verified.
        seed: Of k-means.
    """

    reads: ClassVar[Reads] = "examples"
    prototypes: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prototypes < 1:
            raise IncompatibleError(f"prototypes must be at least 1, got {self.prototypes}")

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return the prototypes of every adapter.

        Raises:
            BackendUnavailableError: scikit-learn is not installed.
        """
        found, owners = [], []
        for adapter in range(len(samples.counts)):
            own = samples.vectors[samples.owners == adapter]
            count = min(self.prototypes, len(np.unique(own, axis=0)))
            found.append(kmeans(own, count, seed=self.seed))
            owners += [adapter] * count
        vectors = np.concatenate(found).astype(np.float32)
        bias = -0.5 * np.einsum("vd,vd->v", vectors, vectors, dtype=np.float64)
        return AdapterVectors(vectors, np.array(owners), bias.astype(np.float32))
