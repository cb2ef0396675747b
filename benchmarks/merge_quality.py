"""Merge methods on the demo bank: groups of adapters merged at equal output rank, exact match on test items.

    python benchmarks/merge_quality.py --out OUT --device cuda --workers 15    # one GPU; again: what is missing
    python benchmarks/merge_quality.py --out OUT --parts pairs --methods sum ties --groups 2 --items 20 --shots 8
    python benchmarks/merge_quality.py --print benchmarks/merge_quality.jsonl

Parts: ``pairs``, ``fours``, ``nines`` and ``all`` cut the 36 upstream adapters into groups of 2, 4, 9 and 36, so that
every task counts once per seed; each group is merged and asked all of its own tasks, normalised task by task by the
exact match of the task's own adapter. ``composition`` and ``mixture`` merge the adapters that a held-out task draws on
and ask that task. Every result has the rank of the largest adapter in its group (or --rank). A factor of the result
and, where there is one, the density are chosen on shots (exact match, then loss), never on test items. Methods with
data get the same shots. Prints means over tasks, with the spread over seeds (standard deviation).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

SIZES = {"pairs": 2, "fours": 4, "nines": 9, "all": 36}
PARTS = (*SIZES, "composition", "mixture")
FILE = "merge_quality.jsonl"
OPTIONS: dict[str, dict[str, Any]] = {"adamerging": {"steps": 100, "lr": 0.01}, "cat": {"steps": 100, "lr": 0.01}}
"""In place of the papers' 1000 steps at 1e-3 and one epoch at 1e-4, which a few dozen shots do not fill."""


class Group(NamedTuple):
    """Adapters merged together, and the tasks they are asked."""

    part: str
    seed: int
    adapters: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Identifies the group among all."""
        return f"{self.part}/{self.seed}/{'+'.join(self.tasks)}"


class Job(NamedTuple):
    """One row to measure."""

    group: Group
    method: str
    shots: int
    items: int
    rank: int | None
    device: str
    rows: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What a row is found by when a run goes on."""
        return self.group.name, self.method, self.shots, self.items, self.rank


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help=f"folder of {FILE}")
    parser.add_argument("--print", type=Path, dest="shown", metavar="FILE", help="only print the table of these rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--methods", nargs="+", help="default: all, those with data included")
    parser.add_argument("--seeds", type=int, default=1, help="how the bank is cut, and which shots are drawn")
    parser.add_argument("--groups", type=int, default=36, help="at most so many groups per part and seed")
    parser.add_argument("--shots", type=int, default=24, help="items per task that choose")
    parser.add_argument("--items", type=int, default=100, help="test items per task")
    parser.add_argument("--rank", type=int, help="of every result; default: the largest in the group")
    parser.add_argument("--rows", type=int, help="scored in one batch; default: 1024 on a GPU, 128 on a CPU")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes; run again to go on")
    arguments = parser.parse_args()
    if arguments.shown is not None:
        print_table([json.loads(line) for line in arguments.shown.read_text().splitlines()])
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / FILE
    jobs = plan(arguments)
    rows = run(jobs, file, arguments.workers, arguments.minutes)
    print_table(rows)
    found = f"{len(rows)} of {len(jobs)} rows in {file}"
    print(f"\n{found}; {arguments.shots} shots and {arguments.items} test items per task, device {arguments.device}")


def plan(arguments: argparse.Namespace) -> list[Job]:
    """Return every row that was asked for: large groups first, then methods with data, small groups first."""
    from compose.engine.data_merge import DATA_METHODS
    from compose.fewshot.compare import REFERENCES, data_free_methods

    methods = arguments.methods or [*data_free_methods(), *DATA_METHODS]
    groups = [
        group
        for seed in range(arguments.seeds)
        for part in arguments.parts
        for group in groups_of(part, seed)[: arguments.groups]
    ]
    rows = arguments.rows or (128 if arguments.device == "cpu" else 1024)
    jobs = [
        Job(group, method, arguments.shots, arguments.items, arguments.rank, arguments.device, rows)
        for group in groups
        for method in dict.fromkeys([*REFERENCES, *methods])
    ]

    def place(job: Job) -> tuple[bool, int]:
        with_data, size = job.method in DATA_METHODS, len(job.group.adapters)
        return with_data, size if with_data else -size

    return sorted(jobs, key=place)


def groups_of(part: str, seed: int) -> list[Group]:
    """Return the groups of one part: a seeded partition of the upstream tasks, or one per held-out task."""
    from compose.demo.tasks import TASKS

    if part not in SIZES:
        held_out = sorted(name for name, task in TASKS.items() if task.group == part)
        return [Group(part, seed, TASKS[name].skills, (name,)) for name in held_out]
    names = sorted(name for name, task in TASKS.items() if task.group == "upstream")
    random.Random(f"{part}/{seed}").shuffle(names)
    cuts = [tuple(sorted(names[start : start + SIZES[part]])) for start in range(0, len(names), SIZES[part])]
    return [Group(part, seed, cut, cut) for cut in cuts]


def run(jobs: list[Job], file: Path, workers: int, minutes: float) -> list[dict[str, Any]]:
    """Measure every row that ``file`` lacks in worker processes, append rows as they come, return all asked for."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    wanted = {job.key for job in jobs}
    rows = [row for row in rows if key_of(row) in wanted]
    finished = {key_of(row) for row in rows}
    jobs = [job for job in jobs if job.key not in finished]
    started = last = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(workers, max(1, len(jobs))), initializer=quiet) as pool, file.open("a") as stream:
        for done, row in enumerate(pool.imap_unordered(measure, jobs), start=1):
            rows.append(row)
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            now = time.monotonic()
            if now - last > 10 or done == len(jobs):
                last = now
                print(f"[{(now - started) / 60:5.1f} min] {done}/{len(jobs)}", file=sys.stderr, flush=True)
            if (now - started) / 60 > minutes:
                print(f"stopped after {done} of {len(jobs)} rows", file=sys.stderr)
                pool.terminate()
                break
    return rows


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return the key of a row's job."""
    return row["group"], row["name"], row["shots"], row["items"], row["rank"]


def quiet() -> None:
    """Prepare a worker: one thread, no network, no remarks."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)


@cache
def loaded_demo(device: str) -> tuple[Any, Any]:
    """Return the demo's model on a device, and its bank; a worker loads them once."""
    from compose.bank import Bank
    from compose.demo.assets import demo_bank, demo_base
    from compose.fewshot.loading import load_model

    return load_model(demo_base(), device=device), Bank.open(demo_bank())


def measure(job: Job) -> dict[str, Any]:
    """Return one row."""
    from compose.demo.tasks import TASKS, shots, test_items
    from compose.fewshot.compare import Comparison, TaskItems, record_of
    from compose.text.examples import Example

    def drawn(name: str) -> tuple[Example, ...]:
        return tuple(Example(*item) for item in shots(TASKS[name], job.shots, job.group.seed))

    loaded, bank = loaded_demo(job.device)
    tasks = {
        name: TaskItems(drawn(name), tuple(Example(*item) for item in test_items(TASKS[name], job.items)))
        for name in job.group.tasks
    }
    comparison = Comparison(
        loaded,
        bank.select(job.group.adapters),
        tasks,
        rank=job.rank,
        data={name: drawn(name) for name in job.group.adapters},
        options=OPTIONS,
        seed=job.group.seed,
        rows=job.rows,
    )
    about = {"part": job.group.part, "seed": job.group.seed, "group": job.group.name}
    return {
        **about,
        **record_of(comparison.row(job.method)),
        "shots": job.shots,
        "items": job.items,
        "rank": job.rank,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line per method: a mean per part, the median factor chosen, and the mean loss by recompression."""
    owns = {row["group"]: row["tasks"] for row in rows if row["name"] == "own adapter"}
    totals = {part: len({row["group"] for row in rows if row["part"] == part}) for part in PARTS}
    parts = [part for part in PARTS if totals[part]]
    scored = [row for row in rows if not row["skipped"]]
    print("| method | " + " | ".join(parts) + " | mean | factor | lost |")
    print("| --- |" + " ---: |" * (len(parts) + 3))
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in scored if row["name"] == name]
        cells = [cell([row for row in mine if row["part"] == part], owns, totals[part]) for part in parts]
        values = [value for value, _ in cells if value is not None]
        if not values:
            continue
        reference = mine[0]["kind"] == "reference"
        whole = mean(values) if len(values) == len(parts) else None
        label = f"*{name}*" if reference else name + (" (data)" if mine[0]["kind"] == "data" else "")
        ends = (
            ["", ""]
            if reference
            else [f"{median(row['scale'] for row in mine):.2g}", f"{mean(row['lost'] for row in mine):.2f}"]
        )
        texts = [text for _, text in cells]
        line = f"| {label} | " + " | ".join([*texts, "-" if whole is None else f"{whole:.3f}", *ends]) + " |"
        lines.append((not reference, -(whole if whole is not None else -1.0), name, line))
    for *_, line in sorted(lines):
        print(line)
    skipped = defaultdict(set)
    for row in rows:
        if row["skipped"] and row["kind"] != "reference":
            skipped[row["name"]].add(row["part"])
    for name in sorted(skipped):
        print(f"\n{name} does not merge every group of: {', '.join(sorted(skipped[name], key=PARTS.index))}")


def cell(rows: list[dict[str, Any]], owns: dict[str, Any], total: int) -> tuple[float | None, str]:
    """Mean over tasks and the standard deviation over seeds; a part of which a method lacks groups has no mean."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        for task, scores in row["tasks"].items():
            if row["part"] in SIZES:
                own = owns.get(row["group"], {}).get(task, {}).get("exact", 0.0)
                if own:
                    by_seed[row["seed"]].append(scores["exact"] / own)
            else:
                by_seed[row["seed"]].append(scores["exact"])
    if not by_seed:
        return None, "-"
    means = [mean(values) for values in by_seed.values()]
    text = f"{mean(means):.3f}" + (f" ± {stdev(means):.3f}" if len(means) > 1 else "")
    if len(rows) < total:
        return None, f"({text}, {len(rows)} of {total})"
    return mean(means), text


if __name__ == "__main__":
    main()
