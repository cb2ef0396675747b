"""Queries: full text (FTS5, bm25), filters in SQL, vectors by cosine, and how the two rankings become one.

A text and a vector rank the adapters apart; their scores have no common unit, so the *ranks* are added up: reciprocal
rank fusion, ``sum 1 / (60 + rank)`` (Cormack, Clarke, Büttcher, SIGIR 2009, with their constant 60), over the best
``max(100, 4 k)`` of each ranking. An adapter that only one ranking has counts there alone.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from compose.errors import HubIndexError
from compose.hub_index.records import STATUSES, AdapterSummary

RRF_CONSTANT = 60
MOST_WORDS = 64
MOST_RESULTS = 100_000
# Of name, title, summary, tags, datasets: a word of the name says more than one of the summary.
_WEIGHTS = "bm25(4.0, 4.0, 1.0, 2.0, 2.0)"
_FEW = 20_000


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What an adapter has to be; fields that are None ask nothing.

    Attributes:
        base: The base model's name, or its fingerprint (64 hexadecimal digits).
        task: A tag, a data set or the task of a score, in any case of letters.
        rank: ``(lowest, highest)`` that all its ranks lie in.
        license: As the card says it, in any case of letters.
        min_score: ``(task, metric, value)``: it has a score of at least ``value``.
        status: One of the statuses, or ``"any"``.
    """

    base: str | None = None
    task: str | None = None
    rank: tuple[int, int] | None = None
    license: str | None = None
    min_score: tuple[str, str, float] | None = None
    status: str = "active"

    def __post_init__(self) -> None:
        if self.status not in (*STATUSES, "any"):
            raise HubIndexError(f"status must be one of {', '.join(STATUSES)} or any, got {self.status!r}")
        if self.rank is not None and not _is_interval(self.rank):
            raise HubIndexError(f"rank must be (lowest, highest) with 0 <= lowest <= highest, got {self.rank!r}")
        if self.min_score is not None and not (len(self.min_score) == 3 and _is_number(self.min_score[2])):
            raise HubIndexError(f"min_score must be (task, metric, a finite number), got {self.min_score!r}")
        for text in (self.base, self.task, self.license, *(self.min_score or ())[:2]):
            if text is not None:
                check_query_text(text)

    def clause(self) -> tuple[str, list[Any]]:
        """Return a condition on the table ``adapter``, and its parameters."""
        parts: list[str] = ["1"]
        values: list[Any] = []

        def ask(part: str, *given: Any) -> None:
            parts.append(part)
            values.extend(given)

        if self.status != "any":
            ask("adapter.status = ?", self.status)
        if self.base is not None:
            ask(f"adapter.{'base_fingerprint' if is_hash(self.base) else 'base_id'} = ?", self.base)
        if self.rank is not None:
            ask("adapter.rank_min >= ? AND adapter.rank_max <= ?", *self.rank)
        if self.license is not None:
            ask("adapter.license = ? COLLATE NOCASE", self.license)
        if self.task is not None:
            ask("adapter.id IN (SELECT adapter_id FROM label WHERE value = ?)", self.task.casefold())
        if self.min_score is not None:
            part = "adapter.id IN (SELECT adapter_id FROM score WHERE task = ? AND metric = ? AND value >= ?)"
            ask(part, self.min_score[0], self.min_score[1], float(self.min_score[2]))
        return " AND ".join(parts), values


class Hit(NamedTuple):
    """One adapter that a query found.

    Attributes:
        adapter: Its summary.
        score: What it was ranked by, higher is better: the fused score for a text with a vector, the cosine for a
            vector alone, ``-bm25`` for a text alone, 0 where only filters were given (then the order is by name).
        cosine: With the query's vector; None where it has none among the candidates.
        bm25: Of the query's text, lower is better; None where no word of it is in the adapter's texts.
    """

    adapter: AdapterSummary
    score: float
    cosine: float | None = None
    bm25: float | None = None


class Ranked(NamedTuple):
    """Rows with their scores under one ranking, best first."""

    rows: list[int]
    scores: list[float]


def check_query_text(text: str) -> str:
    """Return the text of a query.

    Raises:
        HubIndexError: It is no text that can be encoded.
    """
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError):
        raise HubIndexError(f"a query is text in valid Unicode, got {text!r:.120}") from None
    return text


def match_expression(text: str) -> str:
    """Return an FTS5 expression for any text a person may type: its words, each quoted, any of them.

    Nothing in the text is an operator. The first 64 distinct words count. ``""`` where there is no word.

    Raises:
        HubIndexError: Not text.
    """
    words = dict.fromkeys(check_query_text(text).replace("\0", " ").replace('"', " ").split())
    spoken = [word for word in words if any(character.isalnum() for character in word)]
    return " OR ".join(f'"{word}"' for word in spoken[:MOST_WORDS])


def by_text(connection: sqlite3.Connection, text: str, filters: Filters, count: int) -> Ranked:
    """Return the ``count`` best adapters for a text, by bm25; of equal ones the one added first."""
    expression = match_expression(text)
    if not expression:
        return Ranked([], [])
    query = f"SELECT rowid, rank FROM adapter_fts WHERE adapter_fts MATCH ? AND rank MATCH '{_WEIGHTS}'"
    cursor = connection.execute(f"{query} ORDER BY rank, rowid", (expression,))
    return first(connection, iter(cursor), filters, count)


def by_name(connection: sqlite3.Connection, filters: Filters, count: int | None) -> list[int]:
    """Return the first ``count`` adapters that pass the filters, by name; None: all."""
    clause, values = filters.clause()
    limit = -1 if count is None else count
    found = connection.execute(f"SELECT id FROM adapter WHERE {clause} ORDER BY name, id LIMIT ?", [*values, limit])
    return [row for (row,) in found]


def depth(k: int) -> int:
    """Return how many adapters of each ranking are fused."""
    return max(100, 4 * k)


def fuse(rankings: Sequence[Sequence[int]]) -> Ranked:
    """Reciprocal rank fusion of rankings of rows; of equal sums the adapter added first."""
    sums: dict[int, float] = {}
    for ranking in rankings:
        for place, row in enumerate(ranking, start=1):
            sums[row] = sums.get(row, 0.0) + 1 / (RRF_CONSTANT + place)
    order = sorted(sums, key=lambda row: (-sums[row], row))
    return Ranked(order, [sums[row] for row in order])


def check_k(k: int) -> int:
    """Return a number of results that can be asked for.

    Raises:
        HubIndexError: It cannot.
    """
    if type(k) is not int or not 1 <= k <= MOST_RESULTS:
        raise HubIndexError(f"k must be a whole number in [1, {MOST_RESULTS}], got {k!r}")
    return k


def first(
    connection: sqlite3.Connection, ranking: Iterator[tuple[int, float]], filters: Filters, count: int
) -> Ranked:
    """Return the first ``count`` of a ranking that pass the filters; exact however few pass."""
    passes = _row_by_row(connection, filters)
    rows: list[int] = []
    scores: list[float] = []
    size, blocks = 2 * count, 0
    while len(rows) < count and (block := list(islice(ranking, size))):
        blocks += 1
        if blocks == 2 and (few := _looked_up(connection, filters)) is not None:
            passes = few.intersection  # few pass, or the first block would have been enough
        allowed = passes([row for row, _ in block])
        for row, score in block:
            if row in allowed:
                rows.append(row)
                scores.append(score)
        size = min(size * 4, 50_000)
    return Ranked(rows[:count], scores[:count])


def _looked_up(connection: sqlite3.Connection, filters: Filters) -> set[int] | None:
    """Return all rows that pass, None where they are many."""
    clause, values = filters.clause()
    found = connection.execute(f"SELECT id FROM adapter WHERE {clause} LIMIT {_FEW + 1}", values).fetchall()
    return {row for (row,) in found} if len(found) <= _FEW else None


def _row_by_row(connection: sqlite3.Connection, filters: Filters) -> Callable[[Iterable[int]], set[int]]:
    """Return what looks at rows to say which of them pass."""
    clause, values = filters.clause()

    def ask(rows: Iterable[int]) -> set[int]:
        query = f"SELECT id FROM adapter WHERE id IN (SELECT value FROM json_each(?)) AND {clause}"
        return {row for (row,) in connection.execute(query, [json.dumps(list(rows)), *values])}

    return ask


def _is_interval(rank: tuple[int, int]) -> bool:
    return len(rank) == 2 and all(type(end) is int for end in rank) and 0 <= rank[0] <= rank[1] < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]  # false for NaN


def is_hash(text: str) -> bool:
    """Return whether ``text`` is a whole SHA-256 in hexadecimal digits."""
    return len(text) == 64 and all(character in "0123456789abcdef" for character in text)
