"""The k largest entries of each row, equal ones in the order of their index."""

from __future__ import annotations

import numpy as np


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the ``k`` largest entries per row, largest first, ties by the smaller index.

    ``argpartition`` finds the border in linear time; only entries at least as large as the border are sorted.

    Args:
        scores: ``(B, N)``; ``-inf`` is allowed, NaN is not.
        k: Larger than ``N`` gives ``N``.

    Returns:
        ``(B, min(k, N))`` int64.
    """
    rows, count = scores.shape
    k = min(k, count)
    if k == 0:
        return np.zeros((rows, 0), np.int64)
    if k == count:
        return np.argsort(-scores, axis=1, kind="stable")
    found = np.empty((rows, k), np.int64)
    border = np.partition(scores, count - k, axis=1)[:, count - k]
    for row in range(rows):
        at_least = np.flatnonzero(scores[row] >= border[row])
        found[row] = at_least[np.argsort(-scores[row, at_least], kind="stable")[:k]]
    return found
