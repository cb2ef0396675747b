"""``sklearn``: exact search by scikit-learn's brute-force neighbours, which walks large batches in cache-sized tiles.

The file's name carries an underscore because ``sklearn`` is the library's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compose.errors import BackendUnavailableError
from compose.retriever.vectors import VECTOR_BACKENDS, Hits, Payload
from compose.retriever.vectors.table import Table, check_k, check_rows


@VECTOR_BACKENDS.register("sklearn")
class SklearnVectors:
    """Exact, for batches: ``NearestNeighbors(algorithm="brute")`` over Euclidean distances of unit rows.

    Their order is that of the cosines; the cosines of what was found are computed anew, since a distance of nearly
    equal vectors has lost its digits. Which of equal vectors comes first is not defined.

    Raises:
        BackendUnavailableError: scikit-learn is not installed.
    """

    summary: ClassVar[str] = "exact, for batches of queries"

    def __init__(self, dim: int) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise BackendUnavailableError(
                "vector backend 'sklearn' needs scikit-learn: pip install 'adapter-compose[retriever]'"
            )
        self._table = Table(dim)
        self.dim = dim

    def __len__(self) -> int:
        return len(self._table)

    def add(self, ids: Sequence[str], vectors: np.ndarray, payloads: Sequence[Payload] | None = None) -> None:
        """Add unit rows."""
        self._table.add(ids, vectors, payloads)

    def search(self, queries: np.ndarray, k: int, where: Payload | None = None) -> Hits:
        """Return the ``k`` closest vectors of every query."""
        unit = check_rows(queries, self.dim, "queries")
        rows, vectors = self._table.subset(where)
        width = min(check_k(k), len(rows))
        if width == 0 or len(unit) == 0:
            return self._table.hits(np.zeros((len(unit), width), np.int64), np.zeros((len(unit), width)))
        chosen = _neighbours(vectors).kneighbors(unit, width, return_distance=False)
        scores = np.einsum("bd,bkd->bk", unit, vectors[chosen])
        order = np.argsort(-scores, axis=1, kind="stable")
        return self._table.hits(
            np.take_along_axis(rows[chosen], order, axis=1), np.take_along_axis(scores, order, axis=1)
        )

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; the others are moved together."""
        self._table.delete(ids)
        self._table.compact()

    def filter(self, where: Payload) -> tuple[str, ...]:
        """Return the ids whose payload has these values."""
        return tuple(self._table.ids[row] for row in self._table.rows_where(where))

    def persist(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table."""
        return self._table.persist(folder, "sklearn", {}, {}, overwrite)

    @classmethod
    def restore(cls, folder: Path) -> SklearnVectors:
        """Read the table."""
        table, _ = Table.restore(folder)
        backend = cls(table.dim)
        backend._table = table
        return backend


def _neighbours(vectors: np.ndarray) -> Any:
    """Return the neighbours of these vectors; fitting only checks and keeps them."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(algorithm="brute", metric="euclidean").fit(vectors)
