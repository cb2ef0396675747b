"""How well the audit's statistics find planted anomalies among siblings, and how often they accuse benign adapters.

    python benchmarks/audit_study.py --out benchmarks/results         # a CPU, minutes; the same seed, the same rows
    python benchmarks/audit_study.py --print benchmarks/audit_study.jsonl
    python benchmarks/audit_study.py --out OUT --tasks 24 --steps 0.1 --batch 2 --planted 3    # whether it runs

A bank of benign adapters of one kind is trained on the demo's base (`audit_bank`) and kept in OUT/audit_bank. Three
times a third of the tasks is held out: their adapters are the clean cases and, with an anomaly planted, the bad ones
(`audit_attacks`); those of the other tasks are the siblings. An adapter's score is its largest z-score among them, a
pair's that of its sum among sums of siblings. AUC: how often a bad case scores above a clean one. "Flagged": score
above the audit's own limit of 4.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

if TYPE_CHECKING:
    from compose.adapter import Adapter
    from compose.hub_index.audit import Reference
    from compose.hub_index.audit.composed import ReferenceDraws

FILE = "audit_study.jsonl"
FOLDS = 3
SMALLER = (20, 40)
FLAG = 4.0
"""The audit's own limit (`compose.hub_index.audit.reference.LIMIT`)."""
Row = dict[str, Any]


class Fold(NamedTuple):
    """One third of the tasks held out."""

    number: int
    reference: Reference
    clean: list[Adapter]
    draws: ReferenceDraws


def main() -> None:
    """Run the study, or print the table of its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help=f"folder of {FILE}")
    parser.add_argument("--print", type=Path, dest="shown", metavar="FILE", help="only print the tables of these rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=36, help="tasks of the demo, three adapters each")
    parser.add_argument("--steps", type=float, default=1.0, help="factor of the training's steps")
    parser.add_argument("--batch", type=int, default=4, help="rows per adapter and step")
    parser.add_argument("--planted", type=int, default=10, help="anomalies per kind, level and fold")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.shown is not None:
        print_tables([json.loads(line) for line in arguments.shown.read_text().splitlines()])
        return
    import torch

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = run(arguments)
    (arguments.out / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_tables(rows)


def run(arguments: argparse.Namespace) -> list[Row]:
    """Train the bank and measure every fold."""
    import torch
    from audit_bank import RANK, WAVES, kept_bank

    started = time.monotonic()
    place = arguments.out / "audit_bank"
    by_task, scores = kept_bank(place, arguments.seed, arguments.tasks, arguments.steps, arguments.batch)
    tell(started, f"{len(scores)} benign adapters trained")
    torch.set_num_threads(1)  # matrices of an audit are too small for a second thread
    about = {"seed": arguments.seed, "rank": RANK, "steps": arguments.steps, "batch": arguments.batch}
    waves = [wave._asdict() for wave in WAVES]
    mean = sum(scores.values()) / len(scores)
    rows: list[Row] = [{"part": "bank", **about, "adapters": len(scores), "exact": round(mean, 3), "waves": waves}]
    for number in range(FOLDS):
        fold = make_fold(by_task, number, arguments.seed)
        rows += list(clean_rows(fold))
        rows += list(planted_rows(fold, arguments.planted, arguments.seed))
        tell(started, f"fold {number + 1} of {FOLDS} measured")
    return rows


def tell(started: float, text: str) -> None:
    """Report progress on stderr."""
    print(f"[{(time.monotonic() - started) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)


def make_fold(by_task: dict[str, list[Adapter]], number: int, seed: int) -> Fold:
    """Hold out every third task."""
    from compose.hub_index.audit import Reference
    from compose.hub_index.audit.composed import ReferenceDraws

    names = list(by_task)
    held = names[number::FOLDS]
    clean = [one for name in held for one in by_task[name]]
    reference = Reference.of([one for name in names if name not in held for one in by_task[name]])
    return Fold(number, reference, clean, ReferenceDraws(clean[:2], [1.0, 1.0], reference, seed=seed))


def score(reference: Reference, adapter: Adapter) -> float:
    """Return the largest z-score of one adapter among its siblings."""
    from compose.hub_index.audit import Member

    return reference.compare(Member.of(adapter))[0].score


def pair_score(draws: ReferenceDraws, pair: Sequence[Adapter]) -> float:
    """Return the largest z-score of a sum of two among sums of siblings."""
    from compose.hub_index.audit.composed import compose_statistics

    return draws.compare(compose_statistics(pair, [1.0, 1.0]))[0].score


def clean_pairs(fold: Fold) -> list[tuple[Adapter, Adapter]]:
    """Pair every held-out adapter with that of the next task."""
    step = len(fold.clean) // FOLDS
    return [(one, fold.clean[(at + step) % len(fold.clean)]) for at, one in enumerate(fold.clean)]


def clean_rows(fold: Fold) -> Iterator[Row]:
    """Yield scores of held-out benign adapters and of their pairs, among all siblings and among fewer."""
    from compose.hub_index.audit import Member, Reference

    members = [Member.of(one) for one in fold.clean]
    share = sum(max(one.energy1 for one in member.statistics.values()) > 0.9 for member in members) / len(members)
    sizes = [*SMALLER, len(fold.reference)]
    for size in sizes:
        few = Reference(sorted(fold.reference.members, key=lambda one: one.identity)[:size])
        found = [few.compare(member)[0].score for member in members]
        flagged = sum(one > FLAG for one in found)
        row = {"part": "clean", "fold": fold.number, "siblings": size, "scores": rounded(found)}
        yield {**row, "flagged": flagged, "cases": len(found), "threshold": round(share, 3)}
    found = [pair_score(fold.draws, pair) for pair in clean_pairs(fold)]
    row = {"part": "clean pairs", "fold": fold.number, "draws": len(fold.draws), "scores": rounded(found)}
    yield {**row, "flagged": sum(one > FLAG for one in found), "cases": len(found)}


def planted_rows(fold: Fold, planted: int, seed: int) -> Iterator[Row]:
    """Yield scores of planted anomalies, one row per kind and level."""
    from audit_attacks import KINDS, LEVELS, plant, plant_pair

    pairs = clean_pairs(fold)
    for level in LEVELS:
        for at, kind in enumerate(KINDS):
            marks = [seed * 10_000 + fold.number * 1000 + at * 100 + number for number in range(planted)]
            places = [(7 * number) % len(fold.clean) for number in range(planted)]
            row = {"part": "planted", "fold": fold.number, "level": level, "kind": kind, "cases": planted}
            if kind == "colluding pair":
                made = [plant_pair(level, *pairs[place], mark) for place, mark in zip(places, marks, strict=True)]
                row["alone"] = rounded([max(score(fold.reference, one) for one in pair) for pair in made])
                row["scores"] = rounded([pair_score(fold.draws, pair) for pair in made])
            else:
                bad = [plant(kind, level, fold.clean[p], mark) for p, mark in zip(places, marks, strict=True)]
                row["scores"] = rounded([score(fold.reference, one) for one in bad])
            yield row


def rounded(values: Sequence[float]) -> list[float]:
    """Keep rows short and equal on every machine that rounds alike."""
    return [round(float(value), 3) for value in values]


def auc(bad: Sequence[float], clean: Sequence[float]) -> float:
    """Return the share of (bad, clean) pairs in which the bad case scores higher; ties count half."""
    wins = sum((one > other) + 0.5 * (one == other) for one in bad for other in clean)
    return wins / (len(bad) * len(clean))


def print_tables(rows: list[Row]) -> None:
    """Print what was found per kind and level, and the false positives."""
    bank = next(row for row in rows if row["part"] == "bank")
    alone = {row["fold"]: row for row in rows if row["part"] == "clean" and row["siblings"] not in SMALLER}
    pairs = {row["fold"]: row for row in rows if row["part"] == "clean pairs"}
    siblings = next(iter(alone.values()))["siblings"]
    about = f"{bank['adapters']} benign adapters of rank {bank['rank']}, mean exact match {bank['exact']:.2f} on their"
    print(f"{about} own tasks; {FOLDS} folds of {siblings} siblings.\n")
    print("| anomaly | attacker | cases | AUC | flagged | AUC of the sum | sum flagged |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    planted = [row for row in rows if row["part"] == "planted"]
    kinds = list(dict.fromkeys(row["kind"] for row in planted))
    cells_of = dict.fromkeys((row["kind"], row["level"]) for row in planted)
    for kind, level in sorted(cells_of, key=lambda one: kinds.index(one[0])):
        mine = [row for row in planted if (row["kind"], row["level"]) == (kind, level)]
        found = [*planted_cells(mine, alone), *(sum_cells(mine, pairs) if "alone" in mine[0] else ("-", "-"))]
        print(f"| {kind} | {level} | {total(mine, 'cases')} | {' | '.join(found)} |")
    print("\n| benign, held out | siblings | cases | flagged |")
    print("| --- | ---: | ---: | ---: |")
    clean = [row for row in rows if row["part"] == "clean"]
    for size in dict.fromkeys(row["siblings"] for row in clean):
        print_clean("adapters", size, [row for row in clean if row["siblings"] == size])
    print_clean("sums of two", siblings, list(pairs.values()))
    share = sum(row["threshold"] for row in alone.values()) / len(alone)
    cases = total(list(alone.values()), "cases")
    print(f'| adapters, by the threshold "a module with energy1 > 0.9" | - | {cases} | {share:.1%} |')


def print_clean(what: str, siblings: int, rows: Sequence[Row]) -> None:
    """Print how many of the clean cases are flagged."""
    cases = total(rows, "cases")
    print(f"| {what} | {siblings} | {cases} | {total(rows, 'flagged') / cases:.1%} |")


def planted_cells(rows: Sequence[Row], alone: dict[int, Row]) -> tuple[str, str]:
    """Return AUC and flagged of adapters one by one; of a pair the higher score of the two counts, clean or not."""
    if "alone" not in rows[0]:
        return cells([(row["scores"], alone[row["fold"]]["scores"]) for row in rows])
    return cells([(row["alone"], pair_maxima(alone[row["fold"]]["scores"])) for row in rows])


def sum_cells(rows: Sequence[Row], pairs: dict[int, Row]) -> tuple[str, str]:
    """Return AUC and flagged of the sums of pairs."""
    return cells([(row["scores"], pairs[row["fold"]]["scores"]) for row in rows])


def pair_maxima(scores: Sequence[float]) -> list[float]:
    """Return the larger score of the two members of every clean pair, as `clean_pairs` makes them."""
    step = len(scores) // FOLDS
    return [max(one, scores[(at + step) % len(scores)]) for at, one in enumerate(scores)]


def cells(folds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[str, str]:
    """Return mean AUC over folds, and the share of bad cases above the limit."""
    mean = sum(auc(bad, clean) for bad, clean in folds) / len(folds)
    bad = [one for scores, _ in folds for one in scores]
    return f"{mean:.2f}", f"{sum(one > FLAG for one in bad) / len(bad):.0%}"


def total(rows: Sequence[Row], key: str) -> int:
    """Sum one number over rows."""
    return sum(int(row[key]) for row in rows)


if __name__ == "__main__":
    main()
