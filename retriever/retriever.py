"""Retriever: names of adapters for a text, by the embedding of the text.

Shape letters: ``B`` texts, ``E`` adapters, ``K`` chosen per text, ``D`` entries of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compose.errors import ComposeError, UnknownNameError, unknown_name
from compose.retriever.adapter_index import AdapterIndex, best_adapters
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Embedding, Samples
from compose.retriever.encoders import Encoder, check_texts
from compose.retriever.scope import Scope, ScopeKind, calibrate, in_scope
from compose.text.examples import Example

LDA_SAMPLES = 5
"""``method="auto"`` takes ``lda`` where every adapter has at least so many samples, ``mean`` elsewhere."""

Exclude = Sequence[str | Collection[str] | None]
"""Per text the adapters that must not be chosen: a name, several, or None."""


class Retrieved(NamedTuple):
    """The best adapters of every text, best first.

    Attributes:
        names: ``B`` rows of at most ``K`` names.
        indices: ``(B, K)`` int64 into the retriever's ``names``; -1 where exclusions or a rejection leave none.
        scores: ``(B, K)`` float32; ``-inf`` where the index is -1.
        rejected: ``(B,)`` bool: the text is out of scope for every adapter; False without a calibrated threshold.
    """

    names: tuple[tuple[str, ...], ...]
    indices: np.ndarray
    scores: np.ndarray
    rejected: np.ndarray


@dataclass(frozen=True, eq=False)
class Retriever:
    """Adapters with their embeddings, and the encoder that made them.

    Attributes:
        encoder: Turns queries into vectors, the same way as the samples.
        names: ``E`` adapters.
        method: The adapter embedding and its options.
        fitted: What queries are scored against.
        backend: How the best are found: ``"auto"`` (exactly, and by ``faiss`` from 2e5 vectors on), ``"exact"``, or a
            registered vector backend. Scores of what was found are exact either way.
        scope: Which texts are refused, where it was calibrated.
    """

    encoder: Encoder
    names: tuple[str, ...]
    method: Embedding
    fitted: AdapterVectors
    backend: str = "auto"
    scope: Scope | None = None

    @classmethod
    def fit(
        cls,
        encoder: Encoder,
        examples: Mapping[str, Sequence[str]],
        method: str | Embedding = "auto",
        *,
        backend: str = "auto",
    ) -> Retriever:
        """Embed every adapter from a few texts.

        Args:
            encoder: Of samples and queries.
            examples: Adapter -> inputs of its task (for ``method="description"``: texts about it), at least one each.
                LoraRetriever takes 20.
            method: ``"auto"`` (`LDA_SAMPLES`), a registered name, or a method with its options.
            backend: How the best are found; see the class.

        Raises:
            ComposeError: No adapters, an adapter without texts, or a text that is no string.
            UnknownNameError: There is no such method.
        """
        empty = [name for name, texts in examples.items() if not texts]
        if not examples or empty:
            given = f"none for {empty[:5]}" if empty else "no adapters"
            raise ComposeError(f"every adapter needs at least one text, got {given}; leave it out or give texts")
        texts = [text for group in examples.values() for text in check_texts(group)]
        owners = np.repeat(np.arange(len(examples)), [len(group) for group in examples.values()])
        return cls.from_vectors(encoder, tuple(examples), encoder.encode(texts), owners, method, backend=backend)

    @classmethod
    def from_vectors(
        cls,
        encoder: Encoder,
        names: Sequence[str],
        vectors: np.ndarray,
        owners: np.ndarray,
        method: str | Embedding = "auto",
        *,
        backend: str = "auto",
    ) -> Retriever:
        """Embed every adapter from vectors that ``encoder`` made earlier.

        Args:
            encoder: The encoder; nothing is encoded.
            names: ``E`` adapters.
            vectors: ``(N, D)`` float32, unit rows.
            owners: ``(N,)`` index into ``names`` of every row, in any order, each at least once.
            method: As in `fit`.
            backend: As in `fit`.

        Raises:
            ComposeError: The arrays do not fit each other, or an adapter has no vector.
        """
        samples = _samples(names, vectors, owners)
        chosen = _method(method, samples)
        return cls(encoder, tuple(names), chosen, chosen.fit(samples), backend)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Return the score of every adapter for every text: ``(B, E)`` float32, larger is better."""
        return self.score_vectors(self.encoder.encode(texts))

    def score_vectors(self, queries: np.ndarray) -> np.ndarray:
        """Return the scores of vectors that the encoder made: ``(B, D)`` -> ``(B, E)`` float32."""
        return self.fitted.scores(self._queries(queries))

    def top(self, texts: Sequence[str], k: int = 3, exclude: Exclude | None = None) -> Retrieved:
        """Return the best adapters of every text.

        Args:
            texts: ``B`` texts.
            k: Adapters per text, at least 1; more than there are gives all.
            exclude: One entry per text: adapters that are passed over, such as the text's own (LoraRetriever's
                out-of-domain protocol).

        Raises:
            ComposeError: ``k`` below 1, or ``exclude`` of another length.
            UnknownNameError: ``exclude`` names an adapter that is not here.
        """
        return self.top_vectors(self.encoder.encode(texts), k, exclude)

    def top_vectors(self, queries: np.ndarray, k: int = 3, exclude: Exclude | None = None) -> Retrieved:
        """Return the best adapters of vectors ``(B, D)`` that the encoder made; see `top`."""
        found = self._best(queries, k, exclude)
        if self.scope is None:
            return found
        rejected = ~in_scope(self.fitted, self._queries(queries), self.scope)
        names = tuple(() if out else line for out, line in zip(rejected, found.names, strict=True))
        indices, scores = found.indices.copy(), found.scores.copy()
        indices[rejected], scores[rejected] = -1, -np.inf
        return Retrieved(names, indices, scores, rejected)

    def top_for_task(self, texts: Sequence[str], k: int = 3) -> Retrieved:
        """Return the best adapters of one task, known by several of its inputs, as one row.

        The inputs are retrieved by the mean of their vectors; with ``lda`` that is the mean of their scores. None is
        rejected: thresholds are calibrated on single texts.

        Raises:
            ComposeError: There are no texts.
        """
        if not len(texts):
            raise ComposeError("a task needs at least one text")
        return self._best(self.encoder.encode(texts).mean(axis=0, keepdims=True), k, None)

    def ranker(self, among: Collection[str] | None = None) -> Callable[[Sequence[Example]], list[str]]:
        """Return what ``few_shot_search(..., ranker=...)`` takes: examples of a task -> names, best first.

        Args:
            among: Adapters that may be named, such as those of a bank; None: all.
        """
        allowed = self.names if among is None else [name for name in self.names if name in among]
        unknown = sorted(set(among or ()) - set(self.names))
        if unknown:
            raise UnknownNameError(unknown_name("adapter of the retriever", unknown[0], self.names))

        def rank(examples: Sequence[Example]) -> list[str]:
            (names,) = self.top_for_task([example.input for example in examples], len(self.names)).names
            return [name for name in names if name in allowed]

        return rank

    def calibrated(
        self,
        inside: Sequence[str],
        outside: Sequence[str] | None = None,
        *,
        keep: float = 0.95,
        kind: ScopeKind | None = None,
    ) -> Retriever:
        """Return a retriever that refuses texts no adapter was trained for.

        Args:
            inside: Held-out texts of the adapters' tasks; samples the retriever was fitted on would look too close.
            outside: Texts of no adapter's task. With them the threshold is the one with the largest mean of both
                rates; without, the share ``keep`` of ``inside`` is kept.
            keep: In (0, 1]; without ``outside``.
            kind: See `compose.retriever.scope`; None: ``"relative"`` where the method has moments (``lda``), else
                ``"score"``.

        Raises:
            ComposeError: No texts, ``keep`` out of range, or a kind that the method cannot give.
        """
        inner = self._queries(self.encoder.encode(inside))
        outer = None if outside is None else self._queries(self.encoder.encode(outside))
        return replace(self, scope=calibrate(self.fitted, inner, outer, keep=keep, kind=kind))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the retriever as a folder, whole or not at all; see `compose.retriever.storage`.

        Raises:
            DuplicateNameError: The folder exists, without ``overwrite``.
        """
        from compose.retriever.storage import save

        return save(self, Path(folder), overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder) -> Retriever:
        """Read a saved retriever.

        Args:
            folder: What `save` wrote.
            encoder: The encoder of its vectors: same fingerprint, prompt and width.

        Raises:
            IncompatibleError: Another encoder or prompt.
            AdapterFormatError: The files are damaged or incomplete.
        """
        from compose.retriever.storage import load

        return load(Path(folder), encoder)

    @cached_property
    def _index(self) -> AdapterIndex | None:
        return AdapterIndex.over(self.fitted, self.backend)

    def _best(self, queries: np.ndarray, k: int, exclude: Exclude | None) -> Retrieved:
        if k < 1:
            raise ComposeError(f"k must be at least 1, got {k}")
        rows = self._queries(queries)
        excluded = self._excluded(exclude, len(rows))
        if self._index is None:
            indices, scores = best_adapters(self.fitted.scores(rows), k, excluded)
        else:
            indices, scores = self._index.best(rows, k, excluded)
        names = tuple(tuple(self.names[index] for index in row if index >= 0) for row in indices)
        return Retrieved(names, indices, scores, np.zeros(len(indices), bool))

    def _queries(self, queries: np.ndarray) -> np.ndarray:
        if queries.ndim != 2 or queries.shape[1] != self.encoder.dim:
            raise ComposeError(f"queries must have shape (B, {self.encoder.dim}), got {queries.shape}")
        queries = queries.astype(np.float32, copy=False)
        if not self.fitted.unit_queries:
            return queries
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        return queries / np.where(lengths > 0, lengths, 1.0)

    def _excluded(self, exclude: Exclude | None, rows: int) -> list[list[int]]:
        """Return the excluded adapters of every row, as indices."""
        if exclude is None:
            return [[] for _ in range(rows)]
        if isinstance(exclude, str) or len(exclude) != rows:
            raise ComposeError(f"exclude must have one entry for each of the {rows} texts, got {len(exclude)}")
        places = {name: index for index, name in enumerate(self.names)}
        found = [[entry] if isinstance(entry, str) else sorted(entry or ()) for entry in exclude]
        for name in {name for entry in found for name in entry} - places.keys():
            raise UnknownNameError(unknown_name("adapter to exclude", name, self.names))
        return [[places[name] for name in dict.fromkeys(entry)] for entry in found]


def _samples(names: Sequence[str], vectors: np.ndarray, owners: np.ndarray) -> Samples:
    if len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ComposeError("names must be distinct, none empty")
    if vectors.ndim != 2 or owners.shape != vectors.shape[:1] or not np.isfinite(vectors).all():
        raise ComposeError(
            f"vectors must be finite, (N, D), with one owner each; got {vectors.shape} and {owners.shape}"
        )
    missing = sorted(set(range(len(names))) - set(owners.tolist()))
    if missing or not len(names) or int(owners.max()) >= len(names) or int(owners.min()) < 0:
        raise ComposeError(
            f"owners must be indices of the {len(names)} names, each at least once; without a vector: {missing[:5]}"
        )
    order = np.argsort(owners, kind="stable")
    return Samples(np.ascontiguousarray(vectors[order], dtype=np.float32), owners[order].astype(np.int64))


def _method(method: str | Embedding, samples: Samples) -> Embedding:
    if not isinstance(method, str):
        return method
    if method == "auto":
        method = "lda" if len(samples.counts) > 1 and samples.counts.min() >= LDA_SAMPLES else "mean"
    return ADAPTER_EMBEDDINGS[method]()
