"""``mean``: the mean of the samples, scaled to length 1: LoraRetriever's cosine (arXiv:2402.09997, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples, cosine_vectors


@ADAPTER_EMBEDDINGS.register("mean")
@dataclass(frozen=True, kw_only=True)
class Mean:
    """``q . m_e / |m_e|``.

    The paper scores by cosine; its released code takes the inner product with the mean as it is (``raw_mean``), which
    ranks adapters with diverse inputs down because their means are short.
    """

    reads: ClassVar[Reads] = "examples"

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return one unit vector per adapter."""
        means = samples.means()
        return cosine_vectors(means, np.arange(len(means)))
