"""``nearest``: every sample stands for its adapter; the closest one decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples, cosine_vectors


@ADAPTER_EMBEDDINGS.register("nearest")
@dataclass(frozen=True, kw_only=True)
class Nearest:
    """``max_j q . x_j``: the retrieval baseline of PHATGOOSE (arXiv:2402.05859) with one neighbour, no vote."""

    reads: ClassVar[Reads] = "examples"

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return all samples."""
        return cosine_vectors(samples.vectors, samples.owners)
