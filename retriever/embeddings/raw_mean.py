"""``raw_mean``: the mean of the samples as it is: what LoraRetriever's released code scores by; for parity only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples


@ADAPTER_EMBEDDINGS.register("raw_mean")
@dataclass(frozen=True, kw_only=True)
class RawMean:
    """``q . m_e``: FAISS ``IndexFlatIP`` over means that are not renormalised (``utils/instructor_retrieval.py``)."""

    reads: ClassVar[Reads] = "examples"

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return one vector per adapter, no longer than 1."""
        means = samples.means().astype(np.float32)
        return AdapterVectors(means, np.arange(len(means)), np.zeros(len(means), np.float32))
