"""Vector search behind one protocol, one file per backend, entered in ``VECTOR_BACKENDS`` by its decorator.

Vectors are unit rows and scores are their cosines; `compose.retriever.vectors.unit_space` brings other scores into
this form. Shape letters: ``N`` vectors, ``D`` entries, ``B`` queries, ``K`` hits of a query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from compose.registry import Registry

Value = str | int | bool
Payload = Mapping[str, Value]
"""Facts of a vector that a search can ask for, such as its base model."""


class Hits(NamedTuple):
    """What was found, best first.

    Attributes:
        ids: ``B`` rows of at most ``k`` ids.
        scores: ``(B, K)`` float32 cosines, ``K`` the longest row; ``-inf`` beyond the end of a shorter one.
    """

    ids: tuple[tuple[str, ...], ...]
    scores: np.ndarray


class VectorBackend(Protocol):
    """Ids with vectors and payloads, searched by cosine.

    Attributes:
        dim: ``D``.
    """

    dim: int

    def __len__(self) -> int: ...

    def add(self, ids: Sequence[str], vectors: np.ndarray, payloads: Sequence[Payload] | None = None) -> None:
        """Add ``(N, D)`` unit rows; nothing is added unless everything fits.

        Raises:
            DuplicateNameError: An id is there already, or given twice.
            IncompatibleError: Another width, rows that are no unit vectors, or another number of ids or payloads.
        """
        ...

    def search(self, queries: np.ndarray, k: int, where: Payload | None = None) -> Hits:
        """Return the ``k`` closest vectors of every unit row of ``queries`` ``(B, D)``.

        Args:
            queries: Unit rows.
            k: At least 1; more than there are gives all.
            where: Only vectors whose payload has these values.
        """
        ...

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors; all of them or, where an id is unknown, none.

        Raises:
            UnknownNameError: An id is not there.
        """
        ...

    def filter(self, where: Payload) -> tuple[str, ...]:
        """Return the ids whose payload has these values, in the order in which they were added."""
        ...

    def persist(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write what `compose.retriever.vectors.opening.open_vectors` needs to bring the backend back."""
        ...


VECTOR_BACKENDS: Registry[Any] = Registry("vector backend", package="compose.retriever.vectors")
"""Classes: ``cls(dim, **options)`` makes an empty backend, ``cls.restore(folder)`` reads what ``persist`` wrote."""
