"""Mixtures on the demo's bank: trained on all upstream tasks at once, scored on them and on the held-out mixtures.

    python benchmarks/router_study.py --out benchmarks/results --workers 2               # a CPU: hours
    python benchmarks/router_study.py --out OUT --device cuda --gpus 4 --workers 60      # four GPUs: 10 minutes
    python benchmarks/router_study.py ... (the same again)       # runs what OUT/router_study.jsonl lacks
    python benchmarks/router_study.py --print benchmarks/router_study_h200.jsonl

Every mixture sees the same training records for the same number of steps; nothing is chosen on test items. Scores are
exact matches of generated text, macro means over tasks; ``±`` is the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

if TYPE_CHECKING:
    from compose.evaluation.result import Row
    from compose.routers.records import MixedExample

GROUPS = ("upstream", "mixture")
Job = tuple[str, int, int, int, int, int, str]
"""Contender, seed, steps, batch, training records, items, device (``"cuda:1"``: that one, alone visible)."""

REFERENCES = "references"
ABLATIONS = {
    "mean gates": "mean gates, told the task",
    "random order": "gates in random order",
    "other rows": "gates of other rows",
}
"""Column -> what follows a contender's name in the rows of its ablations."""


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of router_study.jsonl")
    parser.add_argument("--print", type=Path, dest="shown", metavar="FILE", help="only print the table of these rows")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", type=int, default=1, help="with --device cuda: workers take them in turn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=144)
    parser.add_argument("--records", type=int, default=512, help="training records per task")
    parser.add_argument("--items", type=int, default=10, help="test items per task")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so many minutes")
    arguments = parser.parse_args()
    if arguments.shown is not None:
        print_table([json.loads(line) for line in arguments.shown.read_text().splitlines()])
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "router_study.jsonl"
    print_table(run(arguments, file))
    print(f"\nrows in {file}; {arguments.items} test items per task, device {arguments.device}")


def run(arguments: argparse.Namespace, file: Path) -> list[dict[str, Any]]:
    """Run every (contender, seed) that ``file`` lacks in worker processes; append their rows as they come."""
    from router_contenders import CONTENDERS

    names = arguments.only or [REFERENCES, *CONTENDERS]
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    finished = {(row["job"], row["job_seed"]) for row in rows}
    size = (arguments.steps, arguments.batch, arguments.records, arguments.items)
    wanted = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in names
        if (name, seed) not in finished and (not seed or (name != REFERENCES and CONTENDERS[name].chance))
    ]
    devices = [f"cuda:{gpu}" for gpu in range(arguments.gpus)] if arguments.device == "cuda" else [arguments.device]
    jobs = [(*pair, *size, devices[number % len(devices)]) for number, pair in enumerate(wanted)]
    started, failed = time.monotonic(), list[str]()
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers, quiet, maxtasksperchild=1) as pool, file.open("a") as stream:
        for done, (job, found, problem) in enumerate(pool.imap_unordered(measure_or_tell, jobs), start=1):
            rows += found
            failed += [job[0]] if problem else []
            stream.writelines(json.dumps(row) + "\n" for row in found)
            stream.flush()
            minutes = (time.monotonic() - started) / 60
            print(f"[{minutes:5.1f} min] {done}/{len(jobs)} {job[0]} {job[1]} {problem}", file=sys.stderr, flush=True)
            if minutes > arguments.minutes:
                print(f"stopped after {done} of {len(jobs)} runs", file=sys.stderr)
                pool.terminate()
                break
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return rows


def quiet() -> None:
    """Prepare a worker: one thread, no network, no warnings."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)


def measure_or_tell(job: Job) -> tuple[Job, list[dict[str, Any]], str]:
    """Return a job's rows, or why there are none: one failure must not end the others."""
    device, _, number = job[-1].partition(":")
    if number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number  # before the first use of CUDA in this worker
    try:
        return job, measure((*job[:-1], device)), ""
    except Exception:  # noqa: BLE001 - told, and the exit code says so
        return job, [], traceback.format_exc()[-1500:]


def measure(job: Job) -> list[dict[str, Any]]:
    """Return the rows of one contender with one seed, one per group of tasks and ablation."""
    from router_training import router_run

    from compose.bank import Bank
    from compose.demo.assets import demo_bank, demo_base
    from compose.evaluation.compare import Items, compare, score_run
    from compose.fewshot.loading import load_model

    name, seed, steps, batch, records, items, device = job
    started = time.monotonic()
    loaded, bank = load_model(demo_base(), device=device), Bank.open(demo_bank())
    training = demo_records("upstream", records, "train")
    tests = {group: demo_records(group, items, "test") for group in GROUPS}
    found: list[dict[str, Any]] = []

    def keep(rows: list[Row], group: str) -> None:
        about = {"job": name, "job_seed": seed, "group": group, "steps": steps, "batch": batch}
        found.extend({**about, **row.to_json(), "exact": row.exact if row.tasks else None} for row in rows)

    if name == REFERENCES:
        for group, test in tests.items():
            choosing = demo_records("upstream", 8, "shots")
            keep(list(compare(loaded, bank, [], Items(test=test, choosing=choosing))), group)
    else:
        with router_run(name, loaded, bank, training, seed=seed, steps=steps, batch=batch) as (routed, trained, ready):
            for group, test in tests.items():
                choosing = demo_records("upstream", 8, "shots") if group == "upstream" and not seed else []
                prepared = Items(test=ready(test), choosing=ready(choosing) if choosing else [])
                more = {"seed": seed, "trained": trained, "ablations": bool(choosing)}
                keep(list(score_run(loaded, routed, prepared, name=name, **more)), group)
    for row in found:
        row["seconds"] = round(time.monotonic() - started, 1)
    return found


def demo_records(group: str, count: int, split: Any) -> list[MixedExample]:
    """``count`` records of every task of a group; upstream tasks name their adapter."""
    from compose.demo.tasks import TASKS
    from compose.routers.records import MixedExample
    from compose.text.examples import Example

    found = []
    for task in TASKS.values():
        if task.group == group:
            expert = task.name if group == "upstream" else None
            items = task.sample(0, count, split)
            found += [MixedExample(Example(item.input, item.output), task.name, expert=expert) for item in items]
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one table per length of training; the references, which train nothing, stand in each."""
    from router_contenders import CONTENDERS

    order = {name: place for place, name in enumerate((REFERENCES, *CONTENDERS))}
    rows = sorted(rows, key=lambda row: (order[row["job"]], row["job_seed"]))
    free = [row for row in rows if row["job"] == REFERENCES]
    settings = dict.fromkeys((row["steps"], row["batch"]) for row in rows if row["job"] != REFERENCES)
    for steps, batch in settings or {(0, 0): None}:
        print(f"\n{steps} steps of {batch} records:\n")
        mine = [row for row in rows if row["job"] != REFERENCES and (row["steps"], row["batch"]) == (steps, batch)]
        print_one([*free, *mine])


def print_one(rows: list[dict[str, Any]]) -> None:
    """Print exact match per contender and group, relative to the oracle, with trained parameters."""
    from router_contenders import CONTENDERS

    from compose.evaluation.result import Summary, row_from_json, summarise

    keys = ("name", "kind", "seed", "trained", "tasks", "about", "skipped")
    by_group: dict[str, dict[str, Summary]] = {}
    for group in GROUPS:
        mine = [row_from_json({key: row[key] for key in keys}) for row in rows if row["group"] == group]
        by_group[group] = {summary.name: summary for summary in summarise(mine)}
    heads = ("mixture", "told", "trained parameters", "upstream", "of the oracle", "held-out mixtures", *ABLATIONS)
    print(f"| {' | '.join(heads)} |")
    print("| --- | --- |" + " ---: |" * (4 + len(ABLATIONS)))
    for name, summary in by_group["upstream"].items():
        if summary.kind == "ablation":
            continue
        told = CONTENDERS[name].told if name in CONTENDERS else ""
        ratio = "-" if summary.ratio is None else f"{summary.ratio:.0%}"
        others = [by_group["mixture"].get(name)]
        others += [by_group["upstream"].get(f"{name}: {ablation}") for ablation in ABLATIONS.values()]
        cells = ["-" if other is None else cell(other) for other in others]
        print(f"| {name} | {told} | {summary.trained:,} | {cell(summary)} | {ratio} | {' | '.join(cells)} |")


def cell(summary: Any) -> str:
    """Mean exact match, and its spread where there are several seeds."""
    return f"{summary.exact:.2f}" + (f" ± {summary.spread:.2f}" if summary.seeds > 1 else "")


if __name__ == "__main__":
    main()
