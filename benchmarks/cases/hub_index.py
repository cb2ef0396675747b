"""The hub index: adding adapters durably, opening, asking; against JSON files that are read from end to end."""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hub.records import ENCODER, ENCODER_SHA256, make_record
from registry import Check, Measured, Point, Settings, case
from timing import Timing, interleaved, seconds

from compose.hub_index.durable import publish_file
from compose.hub_index.exchange import line_of
from compose.hub_index.records import AdapterRecord, EmbeddingRecord
from compose.hub_index.store import Index

ENTRIES = 384
BASE, WORDS, RANK, LICENSE = "organisation/base-3", ("translate", "sql"), (4, 16), "mit"
BATCH = 10_000


@case(
    "hub_index",
    description="records of 2 targets and a vector of 384 entries; ask for words, filters, nearest vectors",
    baseline="one JSONL file, read and parsed from end to end; one JSON file per adapter, written durably",
    targets="open <= 20 ms at any size; every query at 10^5 <= 0.3 s",
    requires=(),
)
def hub_index(settings: Settings) -> Iterator[Point]:
    """Yield queries at each size, then adding one by one and in one batch."""
    sizes = [40] if settings.quick else [1_000, 100_000, *([1_000_000] if settings.full else [])]
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="compose-bench-hub-") as folder:
            table = Table(Path(folder), size)
            yield Point(f"ask among {size:,}", table.gate, partial(table.measure, settings))
    count = 10 if settings.quick else 500
    yield Point(f"add {count} one by one", partial(_gate_adding, count), partial(_one_by_one, count, settings))
    many = 20 if settings.quick else 5_000
    yield Point(f"add {many:,} in one batch", partial(_gate_adding, 20), partial(_in_one_batch, many, settings))


class Table:
    """The same adapters as an index and as a JSONL file."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size, self.path, self.lines = size, folder / "hub.db", folder / "hub.jsonl"
        self.query = _vector(np.random.default_rng(1).normal(size=ENTRIES))
        with Index.open(self.path, create=True) as index, self.lines.open("wb") as stream:
            for start in range(0, size, BATCH):
                batch = list(_records(start, min(start + BATCH, size)))
                index.add_all(batch)
                stream.writelines(map(line_of, batch))
        self.index = Index.open(self.path)

    def ask(self, text: str | None = " ".join(WORDS), k: int = 10, **filters: Any) -> list[str]:
        """Return names for a text within a base, rank and licence."""
        found = self.index.query(text, base=BASE, rank=RANK, license=LICENSE, k=k, **filters)
        return [hit.adapter.name for hit in found]

    def scan(self) -> list[str]:
        """Return the names of all that pass, by reading every line."""
        return [adapter["name"] for adapter in self._parsed() if _passes(adapter) and _speaks(adapter)]

    def gate(self) -> None:
        """The index and the scan find the same adapters, and the nearest vectors are those of float64."""
        everything = min(self.size, 100_000)
        scanned = self.scan()
        if scanned == []:
            raise AssertionError("the queries find nothing")
        if sorted(self.ask(k=everything)) != sorted(scanned):
            raise AssertionError("the index and the scan find other adapters")
        if len(self.ask()) != min(10, len(scanned)):
            raise AssertionError("not the first ten")
        nearest = self.index.query(vector=self.query, k=3)
        wanted = sorted(self._cosines(), reverse=True)[:3]
        if not np.allclose([hit.cosine for hit in nearest], wanted, atol=1e-6, rtol=0):
            raise AssertionError("the nearest vectors are others")

    def measure(self, settings: Settings) -> Measured:
        """Time opening and every kind of query; the baseline is the scan for the same adapters."""
        rounds = settings.rounds or (1 if settings.quick else 2 if self.size >= BATCH else 5)
        ours, scan = interleaved(lambda: self.ask(k=10), self.scan, rounds=rounds)
        limit: dict[str, Any] = {} if settings.quick or self.size > 100_000 else {"relation": "<="}
        opening: dict[str, Any] = {} if settings.quick else {"relation": "<="}
        kinds: dict[str, Callable[[], object]] = {
            "filters": lambda: self.ask(text=None),
            "two words": lambda: self.index.query(" ".join(WORDS)),
            "a vector": lambda: self.index.query(vector=self.query),
            "a vector within a base": lambda: self.index.query(vector=self.query, base=BASE),
            "words and a vector": lambda: self.index.query(" ".join(WORDS), vector=self.query),
            "one adapter whole": lambda: self.index.get(f"adapter-{self.size // 2:07d}"),
        }
        checks = [Check("speed-up over the scan", scan.best / ours.best, unit="x"),
                  Check("open", 1e3 * _best(self._open_once, rounds), target=20.0, unit="ms", **opening),
                  Check("open, first vector query", 1e3 * _best(self._open_and_ask, rounds), unit="ms")]  # fmt: skip
        checks += [
            Check(name, 1e3 * _best(kind, rounds), target=300.0, unit="ms", **limit) for name, kind in kinds.items()
        ]
        size = self.path.stat().st_size / self.size
        return Measured(
            [*checks, Check("bytes per adapter", size, unit="B")], ours, scan, note="CPU seconds, warm cache"
        )

    def _cosines(self) -> Iterator[float]:
        """Yield the cosine of every adapter with the query, in float64, from the lines."""
        query = self.query.array().astype(np.float64)
        for adapter in self._parsed():
            (one,) = adapter["embeddings"]
            values = np.frombuffer(base64.b64decode(one["vector"]), "<f4").astype(np.float64)
            yield float(values @ query / (np.linalg.norm(values) * np.linalg.norm(query)))

    def _open_once(self) -> None:
        Index.open(self.path, readonly=True).close()

    def _open_and_ask(self) -> None:
        with Index.open(self.path) as index:
            index.query(vector=self.query)

    def _parsed(self) -> Iterator[dict[str, Any]]:
        with self.lines.open("rb") as stream:
            for line in stream:
                yield json.loads(line)["adapter"]


def _passes(adapter: dict[str, Any]) -> bool:
    inside = RANK[0] <= adapter["rank_min"] and adapter["rank_max"] <= RANK[1]
    return inside and adapter["base_id"] == BASE and adapter["license"] == LICENSE and "status" not in adapter


def _speaks(adapter: dict[str, Any]) -> bool:
    spoken = f"{adapter['title']} {adapter['summary']} {' '.join(adapter['tags'])}".replace(".", " ").replace(",", " ")
    return not set(WORDS).isdisjoint(spoken.split())


def _records(start: int, stop: int) -> Iterator[AdapterRecord]:
    values = np.random.default_rng(start).normal(size=(stop - start, ENTRIES)).astype("<f4")
    for number, row in zip(range(start, stop), values, strict=True):
        yield replace(make_record(number, modules=2, entries=0), embeddings=(_vector(row),))


def _vector(row: np.ndarray) -> EmbeddingRecord:
    return EmbeddingRecord.from_array(row, encoder_id=ENCODER, encoder_sha256=ENCODER_SHA256, kind="card")


def _best(function: Callable[[], object], rounds: int) -> float:
    function()
    return min(seconds(function, "cpu") for _ in range(max(3, rounds)))


def _gate_adding(count: int) -> None:
    """What was added one by one and in one batch is the same, and is what was given."""
    records = list(_records(0, count))
    with (
        tempfile.TemporaryDirectory(prefix="compose-bench-hub-") as folder,
        Index.open(Path(folder) / "a.db", create=True) as alone,
        Index.open(Path(folder) / "b.db", create=True) as together,
    ):
        for record in records:
            alone.add(record)
        together.add_all(records)
        pairs = zip(alone.records(), together.records(), records, strict=True)
        if not all(replace(a, added_at="") == replace(b, added_at="") == wanted for a, b, wanted in pairs):
            raise AssertionError("an adapter that was added is not the one that was given")


def _one_by_one(count: int, settings: Settings) -> Measured:
    """Time durable transactions against durable files, by the clock on the wall: it is the disk that is waited for."""
    records = list(_records(0, count))
    ours, files = [], []
    with tempfile.TemporaryDirectory(prefix="compose-bench-hub-") as folder:
        for turn in range(settings.rounds or (1 if settings.quick else 3)):
            with Index.open(Path(folder) / f"{turn}.db", create=True) as index:
                ours.append(_wall(index.add, records))
            place = Path(folder) / str(turn)
            place.mkdir()
            files.append(_wall(partial(_write_file, place), records))
    mine, theirs = Timing(tuple(ours)).per(count), Timing(tuple(files)).per(count)
    checks = [Check("adapters/s", 1 / mine.best, unit="/s"), Check("JSON files/s", 1 / theirs.best, unit="/s"),
              Check("rate against files", theirs.best / mine.best, unit="x")]  # fmt: skip
    return Measured(checks, mine, theirs, note="wall seconds; each on the disk before the next")


def _write_file(folder: Path, record: AdapterRecord) -> None:
    publish_file(folder / f"{record.name}.json", [line_of(record)])


def _in_one_batch(count: int, settings: Settings) -> Measured:
    records = list(_records(0, count))
    ours, lines = [], []
    with tempfile.TemporaryDirectory(prefix="compose-bench-hub-") as folder:
        for turn in range(settings.rounds or (1 if settings.quick else 3)):
            with Index.open(Path(folder) / f"{turn}.db", create=True) as index:
                ours.append(_wall(index.add_all, [records]))
            path = Path(folder) / f"{turn}.jsonl"
            lines.append(_wall(lambda all_, path=path: publish_file(path, map(line_of, all_)), [records]))
    mine, theirs = Timing(tuple(ours)).per(count), Timing(tuple(lines)).per(count)
    checks = [Check("adapters/s", 1 / mine.best, unit="/s"), Check("JSONL lines/s", 1 / theirs.best, unit="/s"),
              Check("rate against one JSONL file", theirs.best / mine.best, unit="x")]  # fmt: skip
    return Measured(checks, mine, theirs, note="wall seconds; on the disk at the end")


def _wall(function: Callable[[Any], object], items: Iterable[Any]) -> float:
    start = time.perf_counter()
    for item in items:
        function(item)
    return time.perf_counter() - start
