"""Adapter embeddings: how a few vectors of an adapter become what a query is scored against. One file each.

Shape letters: ``N`` samples, ``E`` adapters, ``V`` vectors kept, ``D`` entries of a vector, ``B`` queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from compose.registry import Registry

_SCORES = 2**25
"""Scores of single vectors held at once (128 MB)."""

Reads = Literal["examples", "descriptions", "factors"]
"""What an embedding is made of: inputs of the adapter's task, texts about it, or its weights."""


class Samples(NamedTuple):
    """Vectors of all adapters, those of one adapter next to each other.

    Attributes:
        vectors: ``(N, D)`` float32, unit rows.
        owners: ``(N,)`` int64, ascending: every adapter from 0 to ``E - 1`` at least once.
    """

    vectors: np.ndarray
    owners: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Samples per adapter, ``(E,)``."""
        return np.bincount(self.owners)

    def means(self) -> np.ndarray:
        """Mean per adapter, not renormalised: ``(E, D)`` float64."""
        starts = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        return np.add.reduceat(self.vectors, starts, axis=0, dtype=np.float64) / self.counts[:, None]


@dataclass(frozen=True, eq=False)
class Moments:
    """Gaussians with one covariance, for distances (`compose.retriever.scope`).

    Attributes:
        precision: ``(D, D)`` float32, inverse of the covariance within adapters.
        centre: ``(D,)`` float32, mean of all samples.
        background: ``(D, D)`` float32, inverse of the covariance of all samples.
    """

    precision: np.ndarray
    centre: np.ndarray
    background: np.ndarray


@dataclass(frozen=True, eq=False)
class AdapterVectors:
    """What queries are scored against: adapter ``e`` scores ``max over its v of q . v + bias_v``.

    Attributes:
        vectors: ``(V, D)`` float32.
        owners: ``(V,)`` int64, ascending, every adapter at least once.
        bias: ``(V,)`` float32.
        unit_queries: Scale queries to length 1 first, so that the mean of several texts still gives cosines.
        moments: For distances; None where the method has none.
    """

    vectors: np.ndarray
    owners: np.ndarray
    bias: np.ndarray
    unit_queries: bool = True
    moments: Moments | None = None

    @property
    def starts(self) -> np.ndarray:
        """Index of the first vector of every adapter, ``(E,)``."""
        return np.flatnonzero(np.diff(self.owners, prepend=-1))

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """``(B, D)`` -> ``(B, E)`` float32."""
        adapters = int(self.owners[-1]) + 1
        if len(self.owners) == adapters:
            return queries @ self.vectors.T + self.bias
        found = np.empty((len(queries), adapters), np.float32)
        step = max(1, _SCORES // len(self.owners))
        for start in range(0, len(queries), step):
            flat = queries[start : start + step] @ self.vectors.T + self.bias
            np.maximum.reduceat(flat, self.starts, axis=1, out=found[start : start + step])
        return found

    def scores_of(self, query: np.ndarray, adapters: np.ndarray) -> np.ndarray:
        """``(D,)`` and distinct adapters ``(n,)`` -> their scores ``(n,)`` float32, nothing else computed."""
        ends = np.searchsorted(self.owners, adapters, side="right")
        starts = np.searchsorted(self.owners, adapters, side="left")
        best = [
            float((self.vectors[start:end] @ query + self.bias[start:end]).max())
            for start, end in zip(starts, ends, strict=True)
        ]
        return np.array(best, np.float32)


def cosine_vectors(vectors: np.ndarray, owners: np.ndarray) -> AdapterVectors:
    """Return vectors scored by cosine: rows scaled to length 1; a zero row stays zero and scores 0."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit = (vectors / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return AdapterVectors(unit, owners, np.zeros(len(unit), np.float32))


class Embedding(Protocol):
    """A method: a frozen dataclass of options, registered in `ADAPTER_EMBEDDINGS`."""

    reads: ClassVar[Reads]

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return what queries are scored against."""
        ...


ADAPTER_EMBEDDINGS: Registry[type[Embedding]] = Registry("adapter embedding", package="compose.retriever.embeddings")
