"""R1: kill -9 in the middle of adding, again and again; what was acknowledged has to be there, whole."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compose.hub_index.search import Filters
from compose.hub_index.store import Index
from hub.children import Child
from hub.records import make_record, number_of, same, vector

BATCH = 3
ROUNDS_PER_INDEX = 20
_ANY = Filters(status="any")


def kill_while_adding(folder: Path, rounds: int = 200, seed: int = 0) -> dict[str, Any]:
    """Kill a process that adds adapters ``rounds`` times, each time at another moment, and count what is wrong.

    The process adds one adapter, then three in one transaction, then asks for nearest vectors (which publishes a
    file), and so on. Every 20th round it finds no file and is killed while it makes one, or soon after.
    """
    draw = random.Random(seed)
    counts = dict.fromkeys(("acknowledged", "found", "lost", "half", "torn_batches", "corrupt", "before_the_first"), 0)
    for round_ in range(rounds):
        path = folder / f"kill-{round_ // ROUNDS_PER_INDEX}.db"
        start = 1_000 * (round_ % ROUNDS_PER_INDEX)
        child = Child(_add_for_ever(path, start))
        said = 0 if start == 0 else draw.randrange(1, 12)
        ended = child.kill_after(draw.uniform(0, 0.03), said=said)
        if ended.signal != 9:
            raise RuntimeError(f"the child ended by itself, with {ended}")
        _count(path, start, [int(line) for line in ended.said if line != "open"], counts)
        if (round_ + 1) % ROUNDS_PER_INDEX == 0 or round_ + 1 == rounds:
            _look_at_everything(path, counts)
            path.unlink()
            shutil.rmtree(f"{path}.vectors", ignore_errors=True)
    return {"rounds": rounds, **counts}


def _add_for_ever(path: Path, start: int) -> Callable[[Callable[[str], None]], int]:
    def work(say: Callable[[str], None]) -> int:
        number = start
        with Index.open(path, create=True) as index:
            say("open")
            while True:
                index.add(make_record(number))
                say(str(number))
                numbers = range(number + 1, number + 1 + BATCH)
                index.add_all(make_record(one) for one in numbers)
                for one in numbers:
                    say(str(one))
                index.query(vector=vector("kill"), k=1)
                number += 1 + BATCH

    return work


def _count(path: Path, start: int, acknowledged: list[int], counts: dict[str, int]) -> None:
    """Compare the index with what this round was told, and its pages with themselves."""
    with Index.open(path, create=True) as index:
        names = {number_of(one.name) for one in index.ls(_ANY)}
        fresh = {number for number in names if number >= start}
        counts["acknowledged"] += len(acknowledged)
        counts["found"] += len(fresh)
        counts["before_the_first"] += not fresh and not acknowledged
        counts["lost"] += len(set(acknowledged) - names)
        counts["half"] += sum(not same(index.get(make_record(one).name), make_record(one)) for one in fresh)
        batches = [{one for one in fresh if (one - start) // (1 + BATCH) == turn and (one - start) % (1 + BATCH)}
                   for turn in range(1 + max(fresh, default=start) - start)]  # fmt: skip
        counts["torn_batches"] += sum(len(batch) not in (0, BATCH) for batch in batches)
        counts["corrupt"] += bool(index.check(records=False))


def _look_at_everything(path: Path, counts: dict[str, int]) -> None:
    with Index.open(path) as index:
        counts["corrupt"] += len(index.check())
        names = [one.name for one in index.ls()]
        counts["half"] += sum(not same(index.get(name), make_record(number_of(name))) for name in names)
        near = {hit.adapter.name: hit.cosine for hit in index.query(vector=vector("kill"), k=max(1, len(names)))}
        counts["corrupt"] += any(abs((near.get(name) or 9.0) - _cosine(number_of(name))) > 1e-5 for name in names)


def _cosine(number: int) -> float:
    a, b = (one.array().astype(float) for one in (vector(number), vector("kill")))
    return float(a @ b / ((a @ a) ** 0.5 * (b @ b) ** 0.5))
