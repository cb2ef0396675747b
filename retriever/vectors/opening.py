"""Choosing a backend by the number of vectors, and bringing a persisted one back; not a backend itself."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from compose.errors import AdapterFormatError
from compose.retriever.vectors import VECTOR_BACKENDS, VectorBackend
from compose.retriever.vectors.faiss_ import APPROXIMATE_FROM
from compose.retriever.vectors.table import read_facts

logger = logging.getLogger(__name__)


def new_vectors(dim: int, count: int, backend: str = "auto", **options: Any) -> VectorBackend:
    """Return an empty backend for about ``count`` vectors.

    ``"auto"`` takes ``numpy``, and ``faiss`` from `APPROXIMATE_FROM` vectors on; where faiss is not installed it stays
    with ``numpy``, slower but exact, and logs that. A backend that is named is taken or raises.

    Raises:
        UnknownNameError: There is no such backend.
        BackendUnavailableError: It cannot run here.
    """
    return VECTOR_BACKENDS[chosen_backend(count) if backend == "auto" else backend](dim, **options)


def chosen_backend(count: int) -> str:
    """Return what ``"auto"`` takes for ``count`` vectors."""
    if count < APPROXIMATE_FROM:
        return "numpy"
    if importlib.util.find_spec("faiss") is None:
        logger.warning(
            "%d vectors are searched by numpy, which reads them all for every query; for an approximate index: "
            "pip install 'adapter-compose[ann]'",
            count,
        )
        return "numpy"
    return "faiss"


def open_vectors(folder: str | Path) -> VectorBackend:
    """Bring a persisted backend back.

    Raises:
        AdapterFormatError: The files are damaged or do not fit together.
        BackendUnavailableError: Its library is not installed, or its server not named.
    """
    kind = VECTOR_BACKENDS[read_facts(Path(folder))["backend"]]
    try:
        return kind.restore(Path(folder))
    except (TypeError, KeyError) as error:  # options that its class does not have
        raise AdapterFormatError(f"{folder}: its options do not fit the backend: {error}") from error
