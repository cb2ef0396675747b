"""Composition per input: from retrieved adapters to the weights of every row, as LoraRetriever (arXiv:2402.09997).

What is retrieved for row ``b`` becomes its coefficients ``g_be`` in ``y = W x + Σ_e g_be s_e B_e A_e x`` (outputs
mixed) or ``y = W x + (Σ_e g_be √s_e B_e)(Σ_e g_be √s_e A_e) x`` (parameters mixed). Nothing here runs a model;
`compose.engine.retrieved` puts the coefficients into force, all rows in one forward.

Shape letters: ``B`` rows, ``E`` adapters of the retriever, ``K`` kept per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from compose.errors import IncompatibleError, UnknownNameError, unknown_name
from compose.retriever.top_k import top_k

ModeName = Literal["selection", "fusion", "mixture", "soup"]
Weighting = Literal["uniform", "similarity"]


class Mode(NamedTuple):
    """How retrieved adapters become coefficients.

    Attributes:
        combine: What is summed; see ``compose.Coefficients``.
        single: Whether the first adapter alone is used.
        shared: Whether all rows are one corpus that gets one set of adapters.
        summary: One line for people.
    """

    combine: Literal["outputs", "parameters"]
    single: bool
    shared: bool
    summary: str


MODES: dict[ModeName, Mode] = {
    "selection": Mode("outputs", True, False, "the first adapter, at full strength"),
    "fusion": Mode("parameters", False, False, "factors of the first k summed, then multiplied"),
    "mixture": Mode("outputs", False, False, "outputs of the first k summed"),
    "soup": Mode("parameters", False, True, "one set of k adapters for the whole batch, factors summed"),
}
WEIGHTINGS: tuple[Weighting, ...] = ("uniform", "similarity")


class RetrievedRows(Protocol):
    """What `Ranks.top` returns: per row the best adapters, the best first."""

    @property
    def indices(self) -> Any:
        """``(B, K)`` numbers of adapters in the retriever's order, -1 where there are no more."""

    @property
    def scores(self) -> Any:
        """``(B, K)``, not increasing along a row."""


class Ranks(Protocol):
    """What composition needs of a retriever: `compose.retriever.retriever.Retriever`, and every other of its shape."""

    @property
    def names(self) -> Sequence[str]:
        """Its adapters."""

    def scores(self, texts: Sequence[str]) -> Any:
        """``(B, E)``: how well every adapter fits every text, the higher the better."""

    def top(self, texts: Sequence[str], k: int, exclude: Any = None) -> RetrievedRows:
        """The first ``k`` adapters of every text, without those that ``exclude`` names for it."""


class Composed(NamedTuple):
    """Sparse coefficients of every row.

    Attributes:
        names: Adapters of the retriever.
        indices: ``(B, K)`` int64: numbers in ``names``, the best first; -1: none.
        weights: ``(B, K)`` float32: 0 where there is none. A row sums to 1, or to 0 where the bare base model runs.
        scores: ``(B, K)`` float32; ``-inf`` where there is none.
        combine: What is summed.
    """

    names: tuple[str, ...]
    indices: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    combine: Literal["outputs", "parameters"]

    def rows(self) -> list[dict[str, float]]:
        """Adapter -> weight of every row, the best first; empty where the bare base model runs."""
        return [
            {self.names[index]: float(weight) for index, weight in zip(indices, weights, strict=True) if index >= 0}
            for indices, weights in zip(self.indices, self.weights, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Composer:
    """Retrieves for every text and turns what is found into weights.

    Differences from LoraRetriever's code: weights of a row sum to 1 however few adapters are left for it (there each
    is ``1/k``; its oracle, one adapter, runs at a third of its strength for ``k = 3``); every adapter has its own
    scaling (there the one loaded last gives its own to all); a text that stands twice in a batch keeps what is
    excluded for each row (there the last one's result serves both); adapters stand in the order of their scores (there
    a ``set`` decides).

    Attributes:
        mode: ``"selection"``, ``"fusion"``, ``"mixture"``; or ``"soup"``, AdapterSoup (arXiv:2302.07027): scores are
            averaged over the texts, which are one corpus, and all rows get the same adapters. Over a retriever of
            ``raw_mean`` vectors that is the mean cosine of all pairs of texts, as ``compose.soup_weights``; over
            `compose.retriever.clusters.ClusterRetriever` it is the paper's choice by clustering.
        k: How many adapters a row gets at most; None: all of them. With ``"fusion"`` and similarity weights that is
            what SMEAR (arXiv:2306.03745) does with a trained gate. ``"selection"`` always takes one.
        weights: ``"uniform"``: ``1/K``, as the papers do. ``"similarity"``: softmax of the kept scores.
        temperature: Of that softmax, in the unit of the scores: cosines need a small one, such as 0.05.
        threshold: Adapters that score less are not used; a row without any runs on the bare base model. None: all are.
            A calibrated retriever (``Retriever.calibrated``) refuses texts by itself; they run on the base model too.
    """

    mode: ModeName = "selection"
    k: int | None = 3
    weights: Weighting = "uniform"
    temperature: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownNameError(unknown_name("mode", str(self.mode), MODES))
        if self.weights not in WEIGHTINGS:
            raise UnknownNameError(unknown_name("weights", str(self.weights), WEIGHTINGS))
        if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1):
            raise IncompatibleError(
                f"k must be a whole number of at least 1, or None for all adapters, got {self.k!r}"
            )
        if not 0 < self.temperature < math.inf:
            raise IncompatibleError(f"temperature must be a positive number, got {self.temperature!r}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise IncompatibleError("threshold must be a number, or None to use every adapter, got nan")

    @property
    def combine(self) -> Literal["outputs", "parameters"]:
        """What is summed."""
        return MODES[self.mode].combine

    def __call__(self, retriever: Ranks, texts: Sequence[str], exclude: Any = None) -> Composed:
        """Compose for every text.

        Args:
            retriever: Any; it is asked once for the whole batch.
            texts: ``B`` inputs as they are, without a prompt template.
            exclude: Adapters that rows must not get, as ``retriever.top`` takes them.

        Raises:
            IncompatibleError: There are no texts, or the retriever's scores are not numbers.
        """
        if isinstance(texts, str) or not len(texts):
            raise IncompatibleError("texts must be a list of at least one text")
        names = tuple(retriever.names)
        k = 1 if MODES[self.mode].single else len(names) if self.k is None else min(self.k, len(names))
        if MODES[self.mode].shared:
            indices, scores = _top_of_mean(np.asarray(retriever.scores(texts), dtype=np.float64), k, exclude, names)
        else:
            found = retriever.top(texts, k, exclude)
            indices, scores = np.asarray(found.indices), np.asarray(found.scores, dtype=np.float64)
        used = indices >= 0
        if np.isnan(scores[used]).any():
            raise IncompatibleError("the retriever's scores are not numbers; fit it again on finite embeddings")
        if self.threshold is not None:
            used &= scores >= self.threshold
        weights = self._weights(scores, used)
        return Composed(
            names,
            np.where(used, indices, -1).astype(np.int64),
            weights.astype(np.float32),
            np.where(used, scores, -np.inf).astype(np.float32),
            self.combine,
        )

    def _weights(self, scores: np.ndarray, used: np.ndarray) -> np.ndarray:
        """``(B, K)`` float64; rows sum to 1, or to 0 where nothing is used."""
        if self.weights == "similarity":
            best = np.where(used, scores, -np.inf).max(axis=1, keepdims=True)
            parts = np.exp(np.where(used, scores - np.where(np.isfinite(best), best, 0.0), -np.inf) / self.temperature)
        else:
            parts = used.astype(np.float64)
        return parts / np.maximum(parts.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)


def first_of(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores ``(B, K)`` of the ``k`` highest of ``scores (B, E)``; of equals the first in order.

    Entries of ``-inf`` are never named: where a row has fewer others it ends in -1 and ``-inf``.
    """
    indices = top_k(scores, k)
    found = np.take_along_axis(scores, indices, axis=1)
    return np.where(np.isneginf(found), -1, indices), found


def allowed(names: Sequence[str], rows: int, exclude: Any) -> np.ndarray:
    """``(B, E)`` bool: adapters that a row may get.

    Args:
        names: Adapters.
        rows: ``B``.
        exclude: None; or per row a name, several names, or None.

    Raises:
        IncompatibleError: Not one entry per row.
        UnknownNameError: A name is not among the adapters.
    """
    mask = np.ones((rows, len(names)), dtype=bool)
    if exclude is None:
        return mask
    if isinstance(exclude, str) or len(exclude) != rows:
        raise IncompatibleError(f"exclude must have one entry for each of the {rows} texts, got {exclude!r:.80}")
    places = {name: place for place, name in enumerate(names)}
    for row, given in enumerate(exclude):
        for name in [given] if isinstance(given, str) else given or ():
            if name not in places:
                raise UnknownNameError(unknown_name("adapter", name, names))
            mask[row, places[name]] = False
    return mask


def _top_of_mean(scores: np.ndarray, k: int, exclude: Any, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The best of the mean over rows, for every row without what is excluded for it."""
    means = np.broadcast_to(scores.mean(axis=0), scores.shape)
    return first_of(np.where(allowed(names, len(scores), exclude), means, -np.inf), k)
