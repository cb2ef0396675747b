"""Inner products with a bias as cosines of unit vectors, so that any backend can search them; not a backend.

Maximum inner product search by cosine after Bachrach et al. (RecSys 2014, "Speeding up the Xbox recommender system"):
with ``w = [v, bias]`` and ``M`` the largest length of any ``w``, the unit vectors ``[w / M, sqrt(1 - |w|^2 / M^2)]``
have with the query ``[q, 1, 0]``, scaled to length 1, a cosine proportional to ``q . v + bias``.
"""

from __future__ import annotations

import numpy as np


def unit_vectors(vectors: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """``(V, D)`` and ``(V,)`` -> unit rows ``(V, D + 2)`` float32."""
    with_bias = np.concatenate([vectors, bias[:, None]], axis=1).astype(np.float64)
    lengths = np.linalg.norm(with_bias, axis=1)
    with_bias /= max(float(lengths.max(initial=0.0)), np.finfo(np.float64).tiny)
    rest = np.sqrt(np.maximum(0.0, 1 - np.einsum("vd,vd->v", with_bias, with_bias)))
    return np.concatenate([with_bias, rest[:, None]], axis=1).astype(np.float32)


def unit_queries(queries: np.ndarray) -> np.ndarray:
    """``(B, D)`` -> unit rows ``(B, D + 2)`` float32."""
    rows = len(queries)
    widened = np.concatenate([queries, np.ones((rows, 1)), np.zeros((rows, 1))], axis=1).astype(np.float64)
    return (widened / np.linalg.norm(widened, axis=1, keepdims=True)).astype(np.float32)
