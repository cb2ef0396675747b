"""R2: many processes write to one index while others read it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compose.errors import HubIndexError
from compose.hub_index.store import Index
from hub.children import Child
from hub.records import WORDS, make_record, number_of, same


def write_together(folder: Path, writers: int = 8, each: int = 500, readers: int = 4) -> dict[str, Any]:
    """Let ``writers`` processes add ``each`` adapters, one durable transaction per adapter, beside ``readers``.

    No process makes the file beforehand. A reader asks and reads whole adapters again and again, and counts those that
    are not exactly what was added and those that vanish; an error ends it.
    """
    path = folder / "writers.db"
    stop = folder / "stop"
    started = time.monotonic()
    adding = [Child(_write(path, number * each, each)) for number in range(writers)]
    reading = [Child(_read(path, stop, number, writers * each)) for number in range(readers)]
    ended = [child.wait() for child in adding]
    seconds = time.monotonic() - started
    stop.touch()
    looked = [child.wait() for child in reading]
    with Index.open(path) as index:
        names = {one.name for one in index.ls()}
        problems = index.check(records=False)
    reads = [list(map(int, one.said[-1].split())) if one.code == 0 and one.said else [0, 1, 0] for one in looked]
    return {
        "writers": writers,
        "each": each,
        "readers": readers,
        "acknowledged": sum(len(one.said) for one in ended),
        "found": len(names),
        "failed_writers": sum(one.code != 0 for one in ended),
        "failed_readers": sum(one.code != 0 for one in looked),
        "reads": sum(one[0] for one in reads),
        "half": sum(one[1] for one in reads),
        "vanished": sum(one[2] for one in reads),
        "corrupt": len(problems),
        "transactions_per_s": round(writers * each / seconds, 1),
    }


def _write(path: Path, start: int, count: int) -> Callable[[Callable[[str], None]], int]:
    def work(say: Callable[[str], None]) -> int:
        with Index.open(path, create=True) as index:
            for number in range(start, start + count):
                index.add(make_record(number))
                say(str(number))
        return 0

    return work


def _read(path: Path, stop: Path, seed: int, total: int) -> Callable[[Callable[[str], None]], int]:
    def work(say: Callable[[str], None]) -> int:
        draw = random.Random(seed)
        reads = half = vanished = 0
        seen: list[int] = []
        index = _open_when_made(path)
        while not stop.exists():
            for hit in index.query(draw.choice(WORDS), k=3):
                half += not same(index.get(hit.adapter.name), make_record(number_of(hit.adapter.name)))
                reads += 1
            for number in (draw.randrange(total), draw.choice(seen or [0])):
                record = make_record(number)
                if record.name in index:
                    half += not same(index.get(record.name), record)
                    reads += 1
                    seen.append(number)
                else:
                    vanished += number in seen
            time.sleep(0.04)
        index.close()
        say(f"{reads} {half} {vanished}")
        return 0

    return work


def _open_when_made(path: Path) -> Index:
    """Open an index that another process is about to make."""
    until = time.monotonic() + 60
    while True:
        try:
            return Index.open(path, readonly=True)
        except HubIndexError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
