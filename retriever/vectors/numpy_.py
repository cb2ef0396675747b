"""``numpy``: exact search by one matrix product; the fastest for single queries up to some 1e5 vectors.

The file's name carries an underscore because ``numpy`` is the library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from compose.retriever.top_k import top_k
from compose.retriever.vectors import VECTOR_BACKENDS, Hits, Payload
from compose.retriever.vectors.table import Table, check_k, check_rows

_SCORES = 2**25
"""Scores held at once (128 MB); queries beyond are taken in turns."""


@VECTOR_BACKENDS.register("numpy")
class NumpyVectors:
    """Exact; ties go to the vector that was added first."""

    summary: ClassVar[str] = "exact, one matrix product"

    def __init__(self, dim: int) -> None:
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
        return self._table.hits(*exact(unit, rows, vectors, check_k(k)))

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; the others are moved together."""
        self._table.delete(ids)
        self._table.compact()

    def filter(self, where: Payload) -> tuple[str, ...]:
        """Return the ids whose payload has these values."""
        return tuple(self._table.ids[row] for row in self._table.rows_where(where))

    def persist(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table."""
        return self._table.persist(folder, "numpy", {}, {}, overwrite)

    @classmethod
    def restore(cls, folder: Path) -> NumpyVectors:
        """Read the table."""
        table, _ = Table.restore(folder)
        backend = cls(table.dim)
        backend._table = table
        return backend


def exact(queries: np.ndarray, rows: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``k`` best of ``rows`` for every query and their cosines, both ``(B, min(k, N))``."""
    width = min(k, len(rows))
    found, best = np.empty((len(queries), width), np.int64), np.empty((len(queries), width), np.float32)
    step = max(1, _SCORES // max(1, len(rows)))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ vectors.T
        chosen = top_k(scores, width)
        found[start : start + step] = rows[chosen]
        best[start : start + step] = np.take_along_axis(scores, chosen, axis=1)
    return found, best
