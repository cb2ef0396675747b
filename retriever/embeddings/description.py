"""``description``: texts about the adapter, such as its card, in place of inputs of its task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples, cosine_vectors


@ADAPTER_EMBEDDINGS.register("description")
@dataclass(frozen=True, kw_only=True)
class Description:
    """The cosine with the mean vector of an adapter's descriptions.

    A description and an input of the task are different kinds of text: take it where there are no examples, and for
    queries that describe what is wanted.
    """

    reads: ClassVar[Reads] = "descriptions"

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return one unit vector per adapter."""
        means = samples.means()
        return cosine_vectors(means, np.arange(len(means)))
