"""What an index survives: ``python benchmarks/hub/durability.py [--only NAME ...] [--quick] [--json]``.

Prints one row per test of spec/ecosystem.md 3.5: how often it tried and what it found; times go to stderr. The exit
code is 1 when anything that has to be 0 is not. No torch is imported: children are forked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Test(NamedTuple):
    """One test.

    Attributes:
        name: Of the specification and in words.
        run: Takes an empty folder and whether to be quick; returns counts, or why it cannot run here.
        zero: The counts that have to be 0.
    """

    name: str
    run: Callable[[Path, bool], dict[str, Any] | str]
    zero: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen tests; returns 1 when one failed."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or Path.cwd()).resolve() not in (HERE, HERE.parents[1])]
    sys.path.insert(0, str(HERE.parent))
    options = _parser().parse_args(arguments)
    known = tests()
    unknown = sorted(set(options.only) - known.keys())
    if unknown:
        print(f"unknown tests {unknown}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = False
    for name in options.only or known:
        with tempfile.TemporaryDirectory(prefix="compose-durability-", dir=options.folder) as folder:
            started = time.monotonic()
            found = known[name].run(Path(folder), options.quick)
        seconds = time.monotonic() - started
        bad = [] if isinstance(found, str) else [one for one in known[name].zero if found[one]]
        failed |= bool(bad)
        if options.json:
            skipped = {"skipped": found} if isinstance(found, str) else {"counts": found}
            print(json.dumps({"test": name, "seconds": round(seconds, 1), "bad": bad, **skipped}), flush=True)
        else:
            print(row(known[name], found, bad), flush=True)
            print(f"{name}: {seconds:.0f} s{_rates(found)}", file=sys.stderr, flush=True)
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported; the children would be forked from a process with threads")
    return int(failed)


def tests() -> dict[str, Test]:
    """Return the tests by name."""
    from hub import disk_full, faults, kill, locks, migration, writers

    wrong = ("lost", "half", "corrupt")
    return {
        "kill": Test("R1 kill -9 while adding",
                     lambda folder, quick: kill.kill_while_adding(folder, 10 if quick else 200),
                     (*wrong, "torn_batches")),
        "writers": Test("R2 concurrent writers and readers",
                        lambda folder, quick: writers.write_together(folder, each=10 if quick else 500),
                        ("failed_writers", "failed_readers", "half", "vanished", "corrupt")),
        "full": Test("R4 index under limits on file sizes",
                     lambda folder, quick: disk_full.fill_index(folder, 5 if quick else 50),
                     (*wrong, "reruns_incomplete", "other_ends")),
        "tmpfs": Test("R4 index on a full disk of 4 MB", lambda folder, _: disk_full.fill_mount(folder),
                      (*wrong, "reruns_incomplete")),
        "files": Test("R4 export, lock, vectors under limits",
                      lambda folder, quick: disk_full.fill_files(folder, 9 if quick else 51),
                      ("partial", "leftovers", "reruns_incomplete")),
        "calls": Test("R6 k-th system call of export, lock, vectors",
                      lambda folder, _: faults.fail_every_call(folder), ("partial", "leftovers", "unordered")),
        "cut": Test("R6 add cut off after every k steps of SQLite",
                    lambda folder, quick: faults.cut_off_sqlite(folder, 50 if quick else 1),
                    ("half", "corrupt", "unusable")),
        "pages": Test("R6 k-th page of the write-ahead log", lambda folder, _: faults.fail_every_page(folder), wrong),
        "migration": Test("R7 migration killed; newer schema refused",
                          lambda folder, quick: migration.kill_while_migrating(folder, 5 if quick else 20),
                          ("unusable", "half", "corrupt", "newer_accepted")),
        "locks": Test("L1 one byte of one adapter changed", lambda folder, _: locks.change_one_byte(folder),
                      ("others_named", "unchanged_refused")),
    }  # fmt: skip


def row(test: Test, found: dict[str, Any] | str, bad: list[str]) -> str:
    """Return a line of a Markdown table: the test, what it counted, and what has to be 0."""
    if isinstance(found, str):
        return f"| {test.name} | skipped: {found} | |"
    shown = [name for name in found if name not in test.zero and not name.endswith("_per_s")]
    counts, zero = (
        ", ".join(f"{name.replace('_', ' ')} {found[name]}" for name in names) for names in (shown, test.zero)
    )
    return f"| {test.name} | {counts} | {zero}{' **FAILED**' if bad else ''} |"


def _rates(found: dict[str, Any] | str) -> str:
    rates = [] if isinstance(found, str) else [name for name in found if name.endswith("_per_s")]
    return "".join(f", {found[name]} {name.replace('_', ' ')}" for name in rates)  # type: ignore[index]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="one test; may be repeated")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that the tests run")
    parser.add_argument("--json", action="store_true", help="one JSON object per test")
    parser.add_argument("--folder", default=None, help="where to write; by default the folder of temporary files")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
