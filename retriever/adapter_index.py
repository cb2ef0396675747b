"""The best adapters of queries: from all scores, or through a vector backend with exact scores of what it found.

Shape letters: ``B`` queries, ``E`` adapters, ``V`` vectors, ``K`` chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compose.retriever.embeddings import AdapterVectors
from compose.retriever.top_k import top_k
from compose.retriever.vectors import VectorBackend
from compose.retriever.vectors.opening import chosen_backend, new_vectors
from compose.retriever.vectors.unit_space import unit_queries, unit_vectors

EXACT = "exact"
Excluded = Sequence[Sequence[int]]
"""Per query the adapters that must not be chosen."""


def best_adapters(scores: np.ndarray, k: int, excluded: Excluded) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``k`` best columns of ``scores`` ``(B, E)`` and their scores, ``(B, min(k, E))``.

    Excluded columns are passed over; where too few are left the index is -1 and the score ``-inf``.
    """
    scores = scores.copy()
    for row, columns in enumerate(excluded):
        scores[row, list(columns)] = -np.inf
    indices = top_k(scores, k)
    best = np.take_along_axis(scores, indices, axis=1)
    return np.where(np.isneginf(best), -1, indices), best


@dataclass(frozen=True, eq=False)
class AdapterIndex:
    """A vector backend over what queries are scored against; ids are the vectors' numbers."""

    fitted: AdapterVectors
    vectors: VectorBackend

    @classmethod
    def over(cls, fitted: AdapterVectors, backend: str) -> AdapterIndex | None:
        """Return an index, or None where all scores are computed: ``"exact"``, and ``"auto"`` below 2e5 vectors."""
        count = len(fitted.vectors)
        if backend == EXACT or (backend == "auto" and chosen_backend(count) == "numpy"):
            return None
        rows = unit_vectors(fitted.vectors, fitted.bias)
        vectors = new_vectors(rows.shape[1], count, backend)
        vectors.add([str(number) for number in range(count)], rows)
        return cls(fitted, vectors)

    def best(self, queries: np.ndarray, k: int, excluded: Excluded) -> tuple[np.ndarray, np.ndarray]:
        """As `best_adapters`, over the adapters that the backend finds.

        Twice as many vectors are asked for until every query has ``k`` adapters that are not excluded, or all vectors
        were asked for.
        """
        adapters = int(self.fitted.owners[-1]) + 1
        per_adapter = -(-len(self.fitted.vectors) // adapters)
        wanted = [min(k + len(columns), adapters) for columns in excluded]
        fetch = min(max(wanted, default=0) * per_adapter, len(self.fitted.vectors))
        unit = unit_queries(queries)
        while True:
            hits = self.vectors.search(unit, max(1, fetch))
            found = [np.unique(self.fitted.owners[[int(id_) for id_ in line]]) for line in hits.ids]
            if fetch >= len(self.fitted.vectors) or all(map(_enough, found, wanted)):
                break
            fetch = min(2 * fetch, len(self.fitted.vectors))
        width = min(k, adapters)
        indices, scores = np.full((len(unit), width), -1), np.full((len(unit), width), -np.inf, np.float32)
        for row, (owners, columns) in enumerate(zip(found, excluded, strict=True)):
            left = np.setdiff1d(owners, list(columns))
            exact = self.fitted.scores_of(queries[row], left)
            chosen = top_k(exact[None], width)[0]
            indices[row, : len(chosen)], scores[row, : len(chosen)] = left[chosen], exact[chosen]
        return indices, scores


def _enough(owners: np.ndarray, wanted: int) -> bool:
    return len(owners) >= wanted
