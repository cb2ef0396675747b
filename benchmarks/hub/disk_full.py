"""R4: the disk is full, or a limit on file sizes is reached, at any byte of the index and of the files beside it."""

from __future__ import annotations

import hashlib
import logging
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compose.hub_index.exchange import export_jsonl
from compose.hub_index.lockfile import lock_adapter, write_lock
from compose.hub_index.records import AdapterRecord
from compose.hub_index.search import Filters
from compose.hub_index.store import Index
from hub.children import Child
from hub.records import make_record, same, vector

BEFORE, MORE = 10, 20
FULL = 28
_SCRIPT = """
import sys; sys.path[:0] = [{benchmarks!r}]
from pathlib import Path; from hub.disk_full import _fill_mount
_fill_mount(Path({mount!r}), {filler})
"""


def fill_index(folder: Path, limits: int = 50, seed: int = 0) -> dict[str, Any]:
    """Add adapters under ``limits`` random limits on the size of a file, then look at what is left, then go on."""
    draw = random.Random(seed)
    whole = folder / "whole.db"
    with Index.open(whole, create=True) as index:
        index.add_all(make_record(number) for number in range(BEFORE))
    highest = 3 << 20  # 20 durable adds write a log of about 2 MB
    counts = dict.fromkeys(("failed", "acknowledged", "lost", "half", "corrupt", "reruns_incomplete", "other_ends"), 0)
    for turn in range(limits):
        path = folder / f"full-{turn}.db"
        shutil.copy(whole, path)
        ended = Child(_add_under(path, draw.randrange(1, highest))).wait()
        counts["failed"] += ended.code == FULL
        counts["other_ends"] += ended.code not in (0, FULL)
        counts["acknowledged"] += len(ended.said)
        _count(path, [int(line) for line in ended.said], counts)
        path.unlink()
    return {"limits": limits, **counts}


def fill_mount(folder: Path) -> dict[str, Any] | str:
    """Fill a tmpfs of 4 MB with an index; returns why not where none can be mounted."""
    mount = folder / "mount"
    mount.mkdir()
    script = _SCRIPT.format(benchmarks=str(Path(__file__).parents[1]), mount=str(mount), filler=2 << 20)
    command = ["unshare", "--mount", "sh", "-c"]
    command += [f"mount -t tmpfs -o size=4m tmpfs '{mount}' && exec '{sys.executable}' -P -c \"$0\"", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no unshare here"
    if "Operation not permitted" in done.stderr or "permission denied" in done.stderr.lower():
        return f"a tmpfs cannot be mounted here: {done.stderr.strip().splitlines()[-1]}"
    if done.returncode:
        raise RuntimeError(done.stderr)
    names = ("failed", "acknowledged", "lost", "half", "corrupt", "reruns_incomplete")
    return dict(zip(names, map(int, done.stdout.split()), strict=True))


def fill_files(folder: Path, limits: int = 50, seed: int = 0) -> dict[str, Any]:
    """Write an export, a lock and a copy of vectors under random limits: the old file stays or the new is whole."""
    draw = random.Random(seed)
    writers = prepare_writers(folder)
    counts = dict.fromkeys(("failed", "old_intact", "new_whole", "partial", "leftovers", "reruns_incomplete"), 0)
    for turn in range(limits):
        name = sorted(writers)[turn % len(writers)]
        writer = writers[name]
        old = writer.reset()
        ended = Child(_write_under(writer, draw.randrange(0, writer.size + 200))).wait()
        counts["failed"] += ended.code == FULL
        compare(writer, old, counts)
        writer.write()
        counts["reruns_incomplete"] += writer.now() != writer.wanted
    return {"limits": limits, **counts}


class Writer:
    """Something that publishes one file beside an index."""

    def __init__(self, path: Callable[[], Path], write: Callable[[], None], old: bytes | None) -> None:
        self._path, self.write, self._old = path, write, old
        write()
        self.wanted = path().read_bytes()
        self.size = len(self.wanted)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path()

    def reset(self) -> bytes | None:
        """Put the old content there, or nothing where there was none, and return it."""
        if self._old is None:
            self.path.unlink(missing_ok=True)
        else:
            self.path.write_bytes(self._old)
        return self._old

    def now(self) -> bytes | None:
        """Return the file's content."""
        return self.path.read_bytes() if self.path.exists() else None


def compare(writer: Writer, old: bytes | None, counts: dict[str, int]) -> None:
    """Count whether the old file is intact, the new one whole, or neither; and unfinished files beside it."""
    now = writer.now()
    counts["old_intact"] += now == old
    counts["new_whole"] += now == writer.wanted
    counts["partial"] += now not in (old, writer.wanted)
    left = [file for file in writer.path.parent.iterdir() if ".tmp-" in file.name]
    counts["leftovers"] += len(left)
    for file in left:
        file.unlink()


def prepare_writers(folder: Path) -> Mapping[str, Writer]:
    """Return the three writers of files of `compose.hub_index`, over one small index."""
    path = folder / "files.db"
    with Index.open(path, create=True) as index:
        index.add_all(make_record(number) for number in range(20))
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    pinned = lock_adapter(
        AdapterRecord(name="pinned", sha256_weights=hashlib.sha256(b"weights").hexdigest(), path="adapter"), adapter
    )

    def export() -> None:
        with Index.open(path, readonly=True) as index:
            export_jsonl(index, folder / "export.jsonl", Filters())

    def ask() -> None:
        with Index.open(path) as index:
            index.query(vector=vector("any"), k=1)

    vectors = folder / "files.db.vectors"
    ask()
    (copy,) = vectors.glob("*.npy")
    return {
        "export": Writer(lambda: folder / "export.jsonl", export, b"what was there before\n"),
        "lock": Writer(lambda: folder / "compose.lock", lambda: _lock(folder, pinned), b"{}\n"),
        "vectors": Writer(lambda: copy, ask, None),
    }


def _lock(folder: Path, pinned: Any) -> None:
    write_lock(folder / "compose.lock", [pinned], {"adapter-compose": "0"})


def _add_under(path: Path, limit: int) -> Callable[[Callable[[str], None]], int]:
    def work(say: Callable[[str], None]) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with Index.open(path) as index:
                for number in range(BEFORE, BEFORE + MORE):
                    index.add(make_record(number))
                    say(str(number))
        except OSError:
            return FULL
        return 0

    return work


def _write_under(writer: Writer, limit: int) -> Callable[[Callable[[str], None]], int]:
    def work(say: Callable[[str], None]) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        logging.disable(logging.WARNING)  # the copy of vectors is optional: its writer warns and goes on
        try:
            writer.write()
        except OSError:
            return FULL
        return 0 if writer.path.exists() else FULL

    return work


def _count(path: Path, acknowledged: list[int], counts: dict[str, int]) -> None:
    wanted = {make_record(number).name: number for number in (*range(BEFORE), *acknowledged)}
    with Index.open(path) as index:
        names = {one.name for one in index.ls()}
        counts["lost"] += len(wanted.keys() - names)
        counts["half"] += sum(not same(index.get(name), make_record(int(name.rpartition("-")[2]))) for name in names)
        counts["corrupt"] += len(index.check())
        index.add_all(make_record(number) for number in range(BEFORE, BEFORE + MORE))
        counts["reruns_incomplete"] += len(index) != BEFORE + MORE


def _fill_mount(mount: Path, filler: int) -> None:
    """Inside the mount: fill it, look, make room, go on; prints the counts."""
    path = mount / "index.db"
    counts = dict.fromkeys(("failed", "acknowledged", "lost", "half", "corrupt", "reruns_incomplete"), 0)
    (mount / "filler").write_bytes(b"x" * filler)
    acknowledged: list[int] = []
    try:
        with Index.open(path, create=True) as index:
            for number in range(100_000):
                index.add(make_record(number))
                acknowledged.append(number)
    except OSError:
        counts["failed"] += 1
    counts["acknowledged"] = len(acknowledged)
    (mount / "filler").unlink()
    with Index.open(path) as index:
        names = {one.name for one in index.ls()}
        counts["lost"] = len({make_record(number).name for number in acknowledged} - names)
        counts["half"] = sum(not same(index.get(name), make_record(int(name.rpartition("-")[2]))) for name in names)
        counts["corrupt"] = len(index.check())
        more = range(len(acknowledged), len(acknowledged) + 20)
        index.add_all(make_record(number) for number in more)
        counts["reruns_incomplete"] = int(len(index) != len(acknowledged) + len(more))
    print(*counts.values())
