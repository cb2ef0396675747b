"""How well the audit's statistics find planted anomalies among siblings, and how often they accuse benign adapters.

    python benchmarks/audit_study.py --out benchmarks/results         # a CPU, minutes; the same seed, the same rows
    python benchmarks/audit_study.py --print benchmarks/audit_study.jsonl
    python benchmarks/audit_study.py --out OUT --tasks 24 --steps 0.1 --batch 2 --planted 3    # whether it runs

A bank of benign adapters of one kind is trained on the demo's base (`audit_bank`) and kept in OUT/audit_bank. Three
times a third of the tasks is held out: their adapters are the clean cases and, with an anomaly planted, the bad ones
(`audit_attacks`); those of the other tasks are the siblings. An adapter's score is its largest z-score among them, a
pair's that of its sum among sums of siblings. AUC: how often a bad case scores above a clean one. The audit remarks on
p-values of at most 0.05, and its findings begin at a score of 4.
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
LIMIT, RARE = 4.0, 0.05
"""The audit's own limits (`compose.hub_index.audit.reference`)."""
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


class Seen(NamedTuple):
    """What the audit says of one case: its score, and the p-value of that among siblings."""

    score: float
    p: float


def look(reference: Reference, adapter: Adapter) -> Seen:
    """Compare one adapter with its siblings."""
    from compose.hub_index.audit import Member

    member = Member.of(adapter)
    return Seen(reference.compare(member)[0].score, reference.p_value(member) or 1.0)


def look_at_sum(draws: ReferenceDraws, pair: Sequence[Adapter]) -> Seen:
    """Compare a sum of two with sums of siblings."""
    from compose.hub_index.audit.composed import compose_statistics

    found = draws.compare(compose_statistics(pair, [1.0, 1.0]))[0].score
    return Seen(found, draws.p_value(found) or 1.0)


def clean_pairs(fold: Fold) -> list[tuple[Adapter, Adapter]]:
    """Pair every held-out adapter with that of the next task."""
    step = len(fold.clean) // FOLDS
    return [(one, fold.clean[(at + step) % len(fold.clean)]) for at, one in enumerate(fold.clean)]


def clean_rows(fold: Fold) -> Iterator[Row]:
    """Yield what is seen of held-out benign adapters and of their pairs, among all siblings and among fewer."""
    from compose.hub_index.audit import Member, Reference

    members = [Member.of(one) for one in fold.clean]
    share = sum(max(one.energy1 for one in member.statistics.values()) > 0.9 for member in members) / len(members)
    for size in (*SMALLER, len(fold.reference)):
        few = Reference(sorted(fold.reference.members, key=lambda one: one.identity)[:size])
        row = {"part": "clean", "fold": fold.number, "siblings": size, "threshold": round(share, 3)}
        yield {**row, **columns([look(few, one) for one in fold.clean])}
    found = [look_at_sum(fold.draws, pair) for pair in clean_pairs(fold)]
    yield {"part": "clean pairs", "fold": fold.number, "draws": len(fold.draws), **columns(found)}


def planted_rows(fold: Fold, planted: int, seed: int) -> Iterator[Row]:
    """Yield what is seen of planted anomalies, one row per kind and level; of a pair, the sum and the worse member."""
    from audit_attacks import CASES, KINDS, plant, plant_pair

    pairs = clean_pairs(fold)
    for kind, level in CASES:
        first = seed * 10_000 + fold.number * 1000 + KINDS.index(kind) * 100
        marks = range(first, first + planted)
        places = [(7 * number) % len(fold.clean) for number in range(planted)]
        row = {"part": "planted", "fold": fold.number, "level": level, "kind": kind}
        if kind == "colluding pair":
            made = [plant_pair(level, *pairs[place], mark) for place, mark in zip(places, marks, strict=True)]
            alone = [[look(fold.reference, one) for one in pair] for pair in made]
            row |= columns([Seen(max(one.score for one in two), min(one.p for one in two)) for two in alone])
            row["sum"] = columns([look_at_sum(fold.draws, pair) for pair in made])
        else:
            bad = [plant(kind, level, fold.clean[p], mark) for p, mark in zip(places, marks, strict=True)]
            row |= columns([look(fold.reference, one) for one in bad])
        yield row


def columns(seen: Sequence[Seen]) -> Row:
    """Return cases as columns of a row."""
    return {"scores": rounded([one.score for one in seen]), "p": rounded([one.p for one in seen])}


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
    clean = [row for row in rows if row["part"] == "clean"]
    alone = {row["fold"]: row for row in clean if row["siblings"] not in SMALLER}
    pairs = {row["fold"]: row for row in rows if row["part"] == "clean pairs"}
    siblings = next(iter(alone.values()))["siblings"]
    about = f"{bank['adapters']} benign adapters of rank {bank['rank']}, mean exact match {bank['exact']:.2f} on their"
    print(f"{about} own tasks; {FOLDS} folds of {siblings} siblings.\n")
    print(f"| anomaly | attacker | cases | AUC | p <= {RARE} | score > {LIMIT:.0f} |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    planted = [row for row in rows if row["part"] == "planted"]
    for kind, level in dict.fromkeys((row["kind"], row["level"]) for row in planted):
        mine = [row for row in planted if (row["kind"], row["level"]) == (kind, level)]
        two = "sum" in mine[0]
        clean_of = {fold: pair_maxima(row["scores"]) if two else row["scores"] for fold, row in alone.items()}
        print_line((f"{kind}, one by one" if two else kind, level), mine, clean_of)
        if two:
            sums = [{**row["sum"], "fold": row["fold"]} for row in mine]
            print_line((f"{kind}, the sum", level), sums, {fold: row["scores"] for fold, row in pairs.items()})
    print(f"\n| benign, held out | siblings | cases | p <= {RARE} | score > {LIMIT:.0f} |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for size in dict.fromkeys(row["siblings"] for row in clean):
        print_line(("adapters", str(size)), [row for row in clean if row["siblings"] == size])
    print_line(("sums of two", str(siblings)), list(pairs.values()))
    share = sum(row["threshold"] for row in alone.values()) / len(alone)
    print(f'\nBenign adapters with "energy1 > 0.9 in a module": {share:.0%}.')


def print_line(heads: tuple[str, str], rows: Sequence[Row], clean: dict[int, list[float]] | None = None) -> None:
    """Print cases, AUC against the clean scores of their fold (mean over folds), and how many are remarked on."""
    scores = [one for row in rows for one in row["scores"]]
    rare = sum(one <= RARE for row in rows for one in row["p"]) / len(scores)
    far = sum(one > LIMIT for one in scores) / len(scores)
    found = [] if clean is None else [f"{sum(auc(row['scores'], clean[row['fold']]) for row in rows) / len(rows):.2f}"]
    share = "{:.1%}" if clean is None else "{:.0%}"
    print(f"| {' | '.join([*heads, str(len(scores)), *found, share.format(rare), share.format(far)])} |")


def pair_maxima(scores: Sequence[float]) -> list[float]:
    """Return the larger score of the two members of every clean pair, as `clean_pairs` makes them."""
    step = len(scores) // FOLDS
    return [max(one, scores[(at + step) % len(scores)]) for at, one in enumerate(scores)]


if __name__ == "__main__":
    main()
