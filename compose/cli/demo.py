"""``compose demo``: few-shot search on three held-out tasks of the shipped demo, with the truthful reading of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import note, print_json, print_table, say
from compose.cli.options import OUTPUT, Force, Json
from compose.errors import RunFolderError
from compose.report.plain import NONE

READING = {
    "wording": "New wording of a skill in the bank: the search finds the adapter that knows it.",
    "composition": "Two skills at once, which no adapter was trained on: weights per adapter and layer join them.",
    "mixture": "Items of two tasks: one set of weights serves all inputs alike, so it cannot tell them apart. "
    "Retrieve or route per input instead.",
}


class Shown(NamedTuple):
    """A task of the demo and the number of examples it is shown with."""

    task: str
    shots: int


TASKS = (Shown("new_wording_pig_latin", 5), Shown("reverse_order_and_dashes", 5), Shown("rule_a_or_b", 5))
TEST_ITEMS = 60
BUDGET = 250.0
FOLDS = 3
CONTROLS = ("base", "constant", "uniform", "best_single", "trained_lora")
"""All but the random bank, which costs another search; budget and controls keep three tasks under two minutes."""

Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Where the run folders and index.html go.", rich_help_panel=OUTPUT
    ),
]


def demo(context: typer.Context, out: Out = Path("compose-demo"), force: Force = False, json: Json = False) -> None:
    """Search on three held-out tasks of the shipped demo, offline, in under two minutes on two cores.

    One task asks for a known skill in new words, one for two skills at once, one mixes two tasks. Each run folder
    holds an adapter and a report; OUT/index.html leads to them.
    """
    if context.invoked_subcommand is not None:
        return
    if out.exists() and any(out.iterdir()) and not force:
        raise RunFolderError(
            f"{out} exists and is not empty; choose another --out, or pass --force to replace its runs"
        )
    rows = run_demo(out)
    index = out / "index.html"
    if json:
        print_json({"folder": str(out), "index": str(index), "tasks": rows})
        return
    _show(rows)
    say(f"report: {index}")


def run_demo(out: Path) -> list[dict[str, Any]]:
    """Run the three searches and write their folders and the index; return one row per task."""
    from compose.bank import Bank
    from compose.cli import demo_files
    from compose.cli.loading import load_base
    from compose.report.index import render_index

    base, bank_folder = demo_files.demo_paths()
    bank = Bank.open(bank_folder)
    loaded = load_base(base)
    note(f"loaded the base model and {len(bank)} adapters from {base.parent}")
    rows = [_run_task(loaded, bank, shown, out) for shown in TASKS]
    (out / "index.html").write_text(render_index(rows), encoding="utf-8")
    return rows


def _run_task(loaded: Any, bank: Any, shown: Shown, out: Path) -> dict[str, Any]:
    from compose.cli.demo_files import demo_examples, demo_task
    from compose.cli.progress import SearchProgress
    from compose.fewshot.run import few_shot_search
    from compose.fewshot.settings import SearchSettings
    from compose.report.html import render

    task = demo_task(shown.task)
    examples, test = demo_examples(task, shown.shots, 0, TEST_ITEMS)
    with SearchProgress(task.name) as progress:
        run = few_shot_search(
            loaded,
            bank,
            examples,
            test=test,
            settings=SearchSettings(budget=BUDGET, folds=FOLDS, controls=CONTROLS),
            out=out / task.name,
            force=True,
            render=render,
            progress=progress,
            command=_command(task.name, shown.shots),
        )
    return summary(run.report, task.name, task.group, task.description)


def _command(task: str, shots: int) -> list[str]:
    """The same search through ``compose search``."""
    budget = ["--budget", f"{BUDGET:.0f}", "--folds", str(FOLDS)]
    options = ["--shots", str(shots), *budget, "--controls", ",".join(CONTROLS)]
    return ["compose", "search", "--demo", task, *options, "--out", task]


def summary(report: Mapping[str, Any], name: str, group: str, description: str) -> dict[str, Any]:
    """Return the row of one task: the measures on its test items, what was chosen, and the reading of its group."""
    matches = {control["name"]: control["test"]["exact_match"] for control in report["controls"] if control["test"]}
    return {
        "task": name,
        "group": group,
        "description": description,
        "shots": report["data"]["examples"],
        "test": report["data"]["test"],
        "exact_match": matches,
        "choice": report["search"]["choice"],
        "reason": report["search"]["reason"],
        "cost": report["search"]["cost"],
        "seconds": report["search"]["seconds"],
        "reading": READING[group],
        "report": f"{name}/report.html",
    }


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    from compose.report.html import CHOICES
    from compose.report.svg import percent

    measures = ("base", "best_single", "trained_lora", "composed")
    cells = [
        [
            row["task"],
            row["group"],
            *(percent(row["exact_match"][name]["mean"]) if name in row["exact_match"] else NONE for name in measures),
            CHOICES.get(row["choice"], row["choice"]),
        ]
        for row in rows
    ]
    say(f"Exact match on {rows[0]['test']} test items per task, none of which was searched on", "bold")
    print_table(["task", "group", ">base", ">best single", ">LoRA on shots", ">composed", "chosen"], cells)
    for row in rows:
        say(f"{row['task']}: {row['reading']}")


def build(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where base and bank go.")] = Path("demo-build"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of data, initial values and batches.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Train the demo's base model and adapters again from a seed (minutes on a GPU, hours on a CPU).

    Prints each adapter's exact match on test items of its own task.
    """
    import logging

    from compose.cli.loading import checked_device

    where = checked_device(device)
    if out.exists() and any(out.iterdir()):
        raise RunFolderError(f"{out} exists and is not empty; choose another --out")
    from compose.demo.build import build as build_demo

    logging.getLogger("compose.demo").setLevel(logging.INFO)
    scores = build_demo(out, seed, where)
    if json:
        print_json({"folder": str(out), "seed": seed, "exact_match": scores})
        return
    print_table(["adapter", ">exact match"], [[name, f"{score:.2f}"] for name, score in scores.items()])
    say(f"folder: {out}")


COMMANDS.register("demo")(
    Command(
        demo,
        examples=("compose demo", "compose demo --out runs/demo --force", "compose demo --json"),
        subcommands={"build": Command(build, examples=("compose demo build --device cuda --out build/demo",))},
    )
)
