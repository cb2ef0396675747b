"""Scope: refusing a text that no adapter was trained for, by a threshold calibrated on held-out texts.

Three measures, larger is closer, of a query ``q`` against the adapters' means ``m_e``:

- ``score``: the best adapter's score. For cosine methods the cosine.
- ``mahalanobis``: ``-min_e (q - m_e)^T P (q - m_e)``, ``P`` the inverse of the covariance within adapters (Lee et al.,
  arXiv:1807.03888, on one layer's features).
- ``relative``: the same plus ``(q - m)^T P_0 (q - m)``, the distance to one Gaussian over all samples: what is unusual
  for every text does not count (Ren et al., arXiv:2106.09022).

The last two need the moments of ``lda``. Shape letters: ``B`` queries, ``E`` adapters, ``D`` entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from compose.errors import ComposeError
from compose.retriever.embeddings import AdapterVectors

ScopeKind = Literal["score", "mahalanobis", "relative"]
KINDS: tuple[ScopeKind, ...] = ("score", "mahalanobis", "relative")


@dataclass(frozen=True)
class Scope:
    """A calibrated rejection.

    Attributes:
        kind: The measure.
        threshold: A text below it is out of scope.
        kept: Share of the calibration's texts in scope at or above it.
        refused: Share of its texts out of scope below it; None where there were none.
    """

    kind: ScopeKind
    threshold: float
    kept: float
    refused: float | None = None


def scope_scores(fitted: AdapterVectors, queries: np.ndarray, kind: ScopeKind) -> np.ndarray:
    """Return the measure of every query: ``(B, D)`` -> ``(B,)`` float64.

    Raises:
        ComposeError: An unknown kind, or one that needs moments the method does not have.
    """
    if kind not in KINDS:
        raise ComposeError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    best = fitted.scores(queries).max(axis=1).astype(np.float64)
    if kind == "score":
        return best
    moments = fitted.moments
    if moments is None:
        raise ComposeError(f"kind={kind!r} needs a covariance, which only method 'lda' has; use kind='score'")
    measured = 2 * best - _form(queries, moments.precision)  # lda's score is q P m_e - m_e P m_e / 2
    if kind == "relative":
        measured += _form(queries - moments.centre, moments.background)
    return measured


def in_scope(fitted: AdapterVectors, queries: np.ndarray, scope: Scope) -> np.ndarray:
    """Return which queries are in scope, ``(B,)`` bool."""
    return scope_scores(fitted, queries, scope.kind) >= scope.threshold


def calibrate(
    fitted: AdapterVectors,
    inside: np.ndarray,
    outside: np.ndarray | None,
    *,
    keep: float,
    kind: ScopeKind | None,
) -> Scope:
    """Choose a threshold; see `compose.retriever.retriever.Retriever.calibrated`."""
    if not len(inside) or (outside is not None and not len(outside)):
        raise ComposeError("calibration needs texts: in scope and, where given, out of scope")
    if not 0 < keep <= 1:
        raise ComposeError(f"keep must lie in (0, 1], got {keep}")
    chosen: ScopeKind = kind or ("score" if fitted.moments is None else "relative")
    inner = np.sort(scope_scores(fitted, inside, chosen))
    if outside is None:
        threshold = float(inner[int(np.floor((1 - keep) * len(inner) + 1e-9))])
        return Scope(chosen, threshold, float((inner >= threshold).mean()))
    outer = np.sort(scope_scores(fitted, outside, chosen))
    candidates = np.unique(np.concatenate([inner, outer]))
    kept = 1 - np.searchsorted(inner, candidates, side="left") / len(inner)
    refused = np.searchsorted(outer, candidates, side="left") / len(outer)
    best = int(np.argmax(kept + refused))
    return Scope(chosen, float(candidates[best]), float(kept[best]), float(refused[best]))


def _form(queries: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``q^T M q`` of every row, ``(B,)`` float64."""
    wide = queries.astype(np.float64)
    return np.einsum("bd,bd->b", wide @ matrix, wide)
