"""Few-shot search on the demo's held-out tasks: three groups of tasks x methods x shots x draws, exact match.

    python benchmarks/demo_study.py --out benchmarks/results --workers 2              # a CPU: hours
    python benchmarks/demo_study.py --out OUT --device cuda --workers 15 --tasks 4 --items 100   # a GPU: 10 minutes
    python benchmarks/demo_study.py ... (the same again)       # runs what OUT/demo_study.jsonl lacks
    python benchmarks/demo_study.py --print benchmarks/demo_study_h200.jsonl --draws 1

Every method sees the same shots and is scored on the same test items; nothing is chosen on test items. Prints the
mean over tasks per group and method with the spread over draws (standard deviation of the groups' means).
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

GROUPS = ("wording", "composition", "mixture")
METHODS: dict[str, dict[str, Any]] = {
    "auto": {"strategy": "auto"},
    "auto, one weight per adapter": {"strategy": "auto", "layers": 1},
    "gradient": {"strategy": "gradient", "budget": 200},
    "CMA-ES, 200 evaluations": {"strategy": "cma", "evaluations": 200},
    "LoRAHub (COBYLA, 40 evaluations)": {
        "strategy": "cobyla",
        "evaluations": 40,
        "combine": "parameters",
        "preselect": "random",
        "l1": 0.05,
    },
}
CONTROLS = {
    "base": "base model",
    "constant": "constant label",
    "uniform": "uniform",
    "best_single": "best single by the same loss",
    "random_bank": "auto over a random bank",
    "trained_lora": "LoRA on the shots, equal cost",
}


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of demo_study.jsonl")
    parser.add_argument("--print", type=Path, dest="shown", metavar="FILE", help="only print the table of these rows")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=6, help="tasks per group, the first ones by name")
    parser.add_argument("--shots", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--items", type=int, default=200, help="test items per task")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after so many minutes")
    arguments = parser.parse_args()
    if arguments.shown is not None:
        rows = [json.loads(line) for line in arguments.shown.read_text().splitlines()]
        print_table([row for row in rows if row["draw"] < arguments.draws])
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "demo_study.jsonl"
    rows = run(arguments, file)
    print_table(rows)
    print(f"\n{len(rows)} rows in {file}; {arguments.items} test items per task, device {arguments.device}")


def run(arguments: argparse.Namespace, file: Path) -> list[dict[str, Any]]:
    """Run every (task, shots, draw) that ``file`` lacks in worker processes; append their rows as they come."""
    from compose.demo.tasks import TASKS

    chosen = [
        name
        for group in GROUPS
        for name in sorted(name for name, task in TASKS.items() if task.group == group)[: arguments.tasks]
    ]
    jobs = [
        (name, shots, draw, arguments.items, arguments.device)
        for draw in range(arguments.draws)
        for shots in sorted(arguments.shots, reverse=True)
        for name in chosen
    ]
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    finished = {(row["task"], row["shots"], row["draw"]) for row in rows}
    jobs = [job for job in jobs if job[:3] not in finished]
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers, initializer=quiet) as pool, file.open("a") as stream:
        for done, found in enumerate(pool.imap_unordered(measure, jobs), start=1):
            rows += found
            stream.writelines(json.dumps(row) + "\n" for row in found)
            stream.flush()
            minutes = (time.monotonic() - started) / 60
            print(f"[{minutes:5.1f} min] {done}/{len(jobs)}", file=sys.stderr, flush=True)
            if minutes > arguments.minutes:
                print(f"stopped after {done} of {len(jobs)} runs", file=sys.stderr)
                pool.terminate()
                break
    return rows


def quiet() -> None:
    """Prepare a worker: one thread, no network, no warnings of short CMA-ES runs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.set_num_threads(1)


def measure(job: tuple[str, int, int, int, str]) -> list[dict[str, Any]]:
    """Return one row per method and control of one (task, shots, draw)."""
    from compose.bank import Bank
    from compose.demo.assets import demo_bank, demo_base
    from compose.demo.tasks import TASKS, shots, test_items
    from compose.fewshot.loading import load_model
    from compose.fewshot.run import few_shot_search
    from compose.fewshot.settings import SearchSettings
    from compose.text.examples import Example

    name, count, draw, items, device = job
    task = TASKS[name]
    loaded, bank = load_model(demo_base(), device=device), Bank.open(demo_bank())
    examples = [Example(item.input, item.output) for item in shots(task, count, draw)]
    test = [Example(item.input, item.output) for item in test_items(task, items)]
    rows = []
    for method, options in METHODS.items():
        controls = tuple(CONTROLS) if method == "auto" else ()
        settings = SearchSettings(**options, controls=controls, seed=draw, bootstrap=1)
        report = few_shot_search(loaded, bank, examples, settings=settings, test=test).report
        about = {"task": name, "group": task.group, "shots": count, "draw": draw}
        for control in report["controls"]:
            label = method if control["name"] == "composed" else CONTROLS[control["name"]]
            score = control["test"]["exact_match"]["mean"]
            rows.append({**about, "method": label, "exact_match": score, "cost": control["cost"]})
            if control["name"] == "composed":
                rows[-1] |= {"choice": report["search"]["choice"], "seconds": report["search"]["seconds"]}
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print mean exact match per group and number of shots, with the spread over draws, and the mean cost."""
    counts = sorted({row["shots"] for row in rows})
    columns = [(group, count) for group in GROUPS for count in counts]
    heads = [f"{group} {count}" for group, count in columns]
    print("| method | " + " | ".join(heads) + " | cost |")
    print("| --- |" + " ---: |" * (len(heads) + 1))
    for method in [*CONTROLS.values(), *METHODS]:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            cells = [cell([row for row in mine if (row["group"], row["shots"]) == column]) for column in columns]
            print(f"| {method} | " + " | ".join(cells) + f" | {mean(row['cost'] for row in mine):.0f} |")


def cell(rows: list[dict[str, Any]]) -> str:
    """Mean over tasks and draws, and the standard deviation over draws of the mean over tasks."""
    by_draw: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_draw[row["draw"]].append(row["exact_match"])
    if not by_draw:
        return "-"
    means = [mean(values) for values in by_draw.values()]
    return f"{mean(means):.2f}" + (f" ± {stdev(means):.2f}" if len(means) > 1 else "")


if __name__ == "__main__":
    main()
