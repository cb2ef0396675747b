"""Vector search behind `compose.retriever.vectors`: single queries and batches, with recall against all cosines."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from registry import Check, Measured, Point, Settings, case
from timing import Timing, interleaved

from compose.retriever.vectors import VECTOR_BACKENDS, VectorBackend

DIM, TOP, BATCH, QUERIES, PER_CENTRE = 384, 5, 64, 200, 100
CONTENDERS: dict[str, dict[str, Any]] = {
    "numpy": {}, "sklearn": {}, "faiss flat": {"kind": "flat"}, "faiss ivf": {"kind": "ivf"},
    "faiss hnsw": {"kind": "hnsw"},
}  # fmt: skip
SLOW_TO_BUILD = "faiss hnsw"
"""Minutes at 1e6 vectors and one thread; left out there."""


class Task(NamedTuple):
    """Vectors, queries, and the true answers."""

    vectors: np.ndarray
    queries: np.ndarray
    truth: np.ndarray


@case(
    "retrieval",
    description=f"{DIM} entries, {PER_CENTRE} a cluster, {TOP} hits; 1e5 vectors (1e6 with --full), one thread",
    baseline="numpy's exact search; for numpy itself scikit-learn's",
    targets=f"recall@{TOP} >= 0.99; faiss ivf >= 10x at single queries",
    requires=("sklearn", "faiss"),
)
def retrieval(settings: Settings) -> Iterator[Point]:
    """Yield one point per number of vectors and backend; a backend is built when its gate runs."""
    for count in (2000,) if settings.quick else (100_000, 1_000_000) if settings.full else (100_000,):
        task = make_task(count, 20 if settings.quick else QUERIES)
        for name in CONTENDERS:
            if count == 1_000_000 and name == SLOW_TO_BUILD:
                continue
            built: dict[str, Any] = {}
            measure = partial(_measure, task, name, built, settings)
            yield Point(f"{count} vectors, {name}", partial(_gate, task, name, built), measure)
            built.clear()
            gc.collect()


def make_task(count: int, queries: int) -> Task:
    """Draw clustered unit vectors, as texts of tasks are: a centre and a third of noise."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((count // PER_CENTRE, DIM), np.float32)

    def draw(rows: int) -> np.ndarray:
        noise = generator.standard_normal((rows, DIM), np.float32)
        found = centres[generator.integers(0, len(centres), rows)] + 0.6 * noise
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    vectors, asked = draw(count), draw(queries)
    truth = np.array([np.argsort(-(vectors @ query), kind="stable")[:TOP] for query in asked])
    return Task(vectors, asked, truth)


def build(name: str, vectors: np.ndarray) -> VectorBackend:
    """Return a filled backend, its index made."""
    backend: VectorBackend = VECTOR_BACKENDS[name.split()[0]](DIM, **CONTENDERS[name])
    backend.add([str(number) for number in range(len(vectors))], vectors)
    backend.search(vectors[:1], 1)
    return backend


def recall(backend: VectorBackend, task: Task) -> float:
    """Share of the true neighbours that are found."""
    hits = backend.search(task.queries, TOP).ids
    found = [len({int(id_) for id_ in line} & set(true)) for line, true in zip(hits, task.truth.tolist(), strict=True)]
    return sum(found) / (TOP * len(found))


def _gate(task: Task, name: str, built: dict[str, Any]) -> None:
    """Exact backends must find the true neighbours, all but ties; approximate ones nine of ten."""
    with _one_thread():
        started = time.process_time()
        built["backend"] = build(name, task.vectors)
        built["seconds"] = time.process_time() - started
        found = recall(built["backend"], task)
    least = 0.9 if name in ("faiss ivf", "faiss hnsw") else 0.999
    if found < least:
        raise AssertionError(f"{name} finds {found:.3f} of the true neighbours, wanted {least}")


def _measure(task: Task, name: str, built: dict[str, Any], settings: Settings) -> Measured:
    rounds = settings.rounds or (1 if settings.quick else 5)
    backend: VectorBackend = built["backend"]
    batch = task.queries[: min(BATCH, len(task.queries))]
    with _one_thread():
        other = build("sklearn" if name == "numpy" else "numpy", task.vectors)
        time_both = partial(interleaved, rounds=rounds, at_least=0.0 if settings.quick else 0.05)
        ours, baseline = time_both(_singles(backend, task.queries[:8]), _singles(other, task.queries[:8]))
        ours, baseline = ours.per(8), baseline.per(8)
        many, many_baseline = time_both(lambda: backend.search(batch, TOP), lambda: other.search(batch, TOP))
        found = recall(backend, task)
    fast = {} if settings.quick or name != "faiss ivf" else {"relation": ">=", "target": 10.0}
    checks = [
        Check("single query", ours.best * 1e3, unit="ms"),
        Check(f"query of a batch of {len(batch)}", many.per(len(batch)).best * 1e3, unit="ms"),
        Check("single query, against the baseline", _ratio(baseline, ours), unit="x", **fast),
        Check("batch, against the baseline", _ratio(many_baseline, many), unit="x"),
        Check(f"recall@{TOP}", found, **({} if settings.quick else {"relation": ">=", "target": 0.99})),
        Check("build", built["seconds"], unit="s"),
    ]
    return Measured(checks, ours, baseline, note="CPU seconds, one thread")


def _singles(backend: VectorBackend, queries: np.ndarray) -> Callable[[], object]:
    return lambda: [backend.search(query[None], TOP) for query in queries]


def _ratio(baseline: Timing, ours: Timing) -> float:
    return baseline.best / max(ours.best, 1e-9)


def _one_thread() -> Any:
    """Hold every BLAS and OpenMP pool, faiss's too, at one thread."""
    import faiss  # noqa: F401 - loaded first, so that its pool is held as well
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)
