"""Hostile input: the drivers of tests/hostile at given volumes, and the table of hub_index/README.md.

    python -P benchmarks/hostile.py                                                   # the volumes of the tests
    python -P benchmarks/hostile.py --write hub_index/README.md                       # and the table goes there
    python -P benchmarks/hostile.py --mutations 1000000 --examples 50000 --seed 1     # as make fuzz
    python -P benchmarks/hostile.py --suites s1 s6

Every suite runs in a process of its own, so that a signal ends that one and is counted; it exits with 1 where a suite
misses its mark. Times are of the slowest case, in CPU and in wall seconds; memory is what the worst case took above
the beginning (S1, S4, S5, S7), or the whole run (S2, S3, S6).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if (
    "tests" not in sys.modules
):  # under pytest it is there; the checkout stays off the path, where kernels/ would shadow
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if TYPE_CHECKING:
    from tests.hostile.figures import Figures

SUITES = {
    "s1": "92 handmade inputs",
    "s2": "mutated adapters, full loader",
    "s3-configs": "drawn configurations, loaded and merged",
    "s3-recipes": "drawn recipes, merged",
    "s3-cards": "mutated cards, results and descriptions",
    "s4": "code-execution canaries",
    "s5": "backtracking expressions in four fields",
    "s6": "files that change at four moments",
    "s7": "allocation bombs under 2 GiB",
}

MARKS = ("<!-- benchmarks/hostile.py -->", "<!-- end of benchmarks/hostile.py -->")
COLUMNS = (
    "suite", "what", "cases", "accepted", "refused", "other exceptions", "signals", "slowest (CPU)", "slowest (wall)",
    "memory",
)  # fmt: skip


def run_here(suite: str, volume: int, seed: int, folder: Path) -> Figures:
    """Run one suite in this process."""
    import torch

    torch.set_num_threads(1)
    return _drivers()[suite](volume, seed, folder)


def _drivers() -> dict[str, Callable[[int, int, Path], Figures]]:
    from tests.hostile import bombs, canaries, cards, changes, configs, handmade_all, mutations, regexes

    return {
        "s1": lambda volume, seed, folder: handmade_all.run(folder),
        "s2": mutations.run,
        "s3-configs": configs.run_configs,
        "s3-recipes": configs.run_recipes,
        "s3-cards": cards.run,
        "s4": lambda volume, seed, folder: canaries.run(folder),
        "s5": lambda volume, seed, folder: regexes.run(folder),
        "s6": lambda volume, seed, folder: changes.run(volume, folder),
        "s7": lambda volume, seed, folder: bombs.run(folder),
    }


def row(suite: str, figures: Figures) -> str:
    """Return one line of the table."""
    cells = [
        suite[:2].upper(),
        SUITES[suite],
        f"{figures.cases:,}",
        f"{figures.accepted:,}",
        f"{figures.refused:,}",
        str(len(figures.other)),
        str(figures.signals),
        f"{figures.cpu_s * 1000:,.0f} ms",
        f"{figures.wall_s * 1000:,.0f} ms",
        f"{figures.extra_bytes / 2**20:,.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run what was asked for; return 1 where a case ended otherwise than it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--examples", type=int, default=5_000, help="of hypothesis, for each of the two strategies")
    parser.add_argument("--texts", type=int, default=3_000, help="mutated cards, results and descriptions")
    parser.add_argument("--repeats", type=int, default=50, help="of every change of a file at every moment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a page; the table goes between its marks")
    parser.add_argument("--one", choices=SUITES, help="run this suite here and print its figures as JSON")
    parser.add_argument("--volume", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gadgets", action="store_true", help="what the audit hook of S4 hears without any care")
    given = parser.parse_args()
    if given.gadgets:
        from tests.hostile.audit_hook import heard

        print("\n".join(f"{name}\t{json.dumps(events)}" for name, events in heard().items()))
        return 0
    if given.one:
        print("\n" + json.dumps(run_here(given.one, given.volume, given.seed, given.folder).as_dict()))
        return 0
    return run_all(given)


def run_all(given: argparse.Namespace) -> int:
    """Run suites one after another and print the table."""
    from tests.hostile.process import run_suite

    memory = Path("/dev/shm")
    volumes = {"s2": given.mutations, "s3-cards": given.texts, "s6": given.repeats}
    volumes |= dict.fromkeys(["s3-configs", "s3-recipes"], given.examples)
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- | --- | {' | '.join(['---:'] * (len(COLUMNS) - 2))} |"]
    print("\n".join(lines))
    failures = []
    for suite in given.suites:
        with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
            figures = run_suite(suite, volumes.get(suite, 0), Path(folder), seed=given.seed)
        lines.append(row(suite, figures))
        print(lines[-1], flush=True)
        failures += [f"{suite}: {problem}" for problem in figures.other]
    for problem in failures[:20]:
        print(problem, file=sys.stderr)
    if given.write is not None:
        write_table(given.write, lines)
    return 1 if failures else 0


def write_table(page: Path, lines: list[str]) -> None:
    """Put the table between its marks on a page."""
    before, mark, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise SystemExit(f"{page}: no place for the table; it lies between {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{before}{mark}\n{chr(10).join(lines)}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
