"""``compose search``: weights over a bank from a few examples, a new adapter and a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import fail, note, print_json
from compose.cli.options import INPUTS, OUTPUT, SEARCH, Banks, Base, Device, Dtype, Force, Json
from compose.cli.search_request import SearchRequest, resume_command

Examples = Annotated[
    Path | None,
    typer.Option(
        "--examples", metavar="FILE", help="JSONL with input and output on each line.", rich_help_panel=INPUTS
    ),
]
Test = Annotated[
    Path | None,
    typer.Option("--test", metavar="FILE", help="Held-out JSONL; scored, never searched on.", rich_help_panel=INPUTS),
]
Demo = Annotated[
    str | None,
    typer.Option(
        "--demo", metavar="TASK", help="A shipped task instead of files; 'list' names them.", rich_help_panel=INPUTS
    ),
]
Shots = Annotated[
    int | None, typer.Option("--shots", metavar="N", help="With --demo: examples. [5]", rich_help_panel=INPUTS)
]
Draw = Annotated[
    int | None,
    typer.Option("--draw", metavar="K", help="With --demo: which draw of shots. [0]", rich_help_panel=INPUTS),
]
Strategy = Annotated[
    str,
    typer.Option("--strategy", help="auto, cma, gradient, greedy, random, cobyla.", rich_help_panel=SEARCH),
]
CombineOption = Annotated[
    Literal["outputs", "parameters"],
    typer.Option("--combine", help="Mix outputs (exact), or sum factors (LoRAHub).", rich_help_panel=SEARCH),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers", metavar="each|N", help="Weights per layer or per N groups; 1: one each.", rich_help_panel=SEARCH
    ),
]
Budget = Annotated[
    float | None,
    typer.Option("--budget", metavar="COST", help="Forward-equivalents to spend. [1000]", rich_help_panel=SEARCH),
]
Candidates = Annotated[
    int, typer.Option("--candidates", help="Adapters that enter the search.", rich_help_panel=SEARCH)
]
PreselectOption = Annotated[
    Literal["loss", "random", "embedding"],
    typer.Option("--preselect", help="How candidates are chosen from a larger bank.", rich_help_panel=SEARCH),
]
RetrieverFolder = Annotated[
    Path | None,
    typer.Option(
        "--retriever",
        metavar="FOLDER",
        help="With --preselect embedding: a saved retriever; --demo has one.",
        rich_help_panel=SEARCH,
    ),
]
Folds = Annotated[
    int, typer.Option("--folds", help="Folds by which auto judges its choice; 0: none.", rich_help_panel=SEARCH)
]
L1 = Annotated[float, typer.Option("--l1", help="Weight of the mean absolute weight.", rich_help_panel=SEARCH)]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.", rich_help_panel=SEARCH)]
Rank = Annotated[
    int | None,
    typer.Option("--rank", metavar="R", help="Recompress the result to this rank.", rich_help_panel=OUTPUT),
]
Controls = Annotated[
    str,
    typer.Option("--controls", metavar="NAMES", help="auto, all, none, or names with commas.", rich_help_panel=SEARCH),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder: adapter, report, journal.", rich_help_panel=OUTPUT),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan and what it will cost; search nothing.", rich_help_panel=OUTPUT),
]


def search(  # noqa: PLR0913 - one parameter per option
    base: Base = None,
    bank: Banks = None,
    examples: Examples = None,
    test: Test = None,
    demo: Demo = None,
    shots: Shots = None,
    draw: Draw = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    strategy: Strategy = "auto",
    combine: CombineOption = "outputs",
    layers: Layers = None,
    budget: Budget = None,
    candidates: Candidates = 20,
    preselect: PreselectOption = "loss",
    retriever: RetrieverFolder = None,
    folds: Folds = 5,
    l1: L1 = 0.2,
    seed: Seed = 0,
    controls: Controls = "auto",
    rank: Rank = None,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Find weights over a bank of adapters from a few examples of a task.

    Writes a run folder: an adapter in PEFT's format with a report (report.html) beside it. The choice is
    guarded by cross-validation over the examples: when nothing beats the base model, that is the result.
    """
    if demo == "list":
        _list_demo(as_json=json)
        return
    options = {name: value for name, value in locals().items() if name != "json"}
    request = SearchRequest(**options)
    try:
        _run(request, as_json=json)
    except KeyboardInterrupt:
        fail(resume_command(request, sys.argv[1:]))
        raise typer.Exit(130) from None


def _run(request: SearchRequest, *, as_json: bool) -> None:
    settings = request.settings()
    from compose.cli.progress import SearchProgress
    from compose.cli.result import show_plan, show_run
    from compose.fewshot.run import few_shot_search, plan_search
    from compose.report.html import render

    inputs = request.load()
    if request.dry_run:
        plan = plan_search(inputs.loaded, inputs.bank, inputs.examples, settings=settings)
        print_json(plan) if as_json else show_plan(plan)
        return
    with SearchProgress() as progress:
        run = few_shot_search(
            inputs.loaded,
            inputs.bank,
            inputs.examples,
            test=inputs.test,
            settings=settings,
            ranker=inputs.ranker,
            out=request.out,
            resume=request.resume,
            force=request.force,
            progress=progress,
            render=render,
            command=["compose", *sys.argv[1:]],
        )
    for warning in run.report["warnings"]:
        note(f"warning: {warning}", "yellow")
    folder = None if run.folder is None else str(run.folder)
    print_json({**run.report, "folder": folder}) if as_json else show_run(run.report, folder)


def _list_demo(*, as_json: bool) -> None:
    from compose.cli.demo_files import demo_tasks, show_tasks

    tasks = demo_tasks()
    print_json({"tasks": tasks}) if as_json else show_tasks(tasks)


COMMANDS.register("search")(
    Command(
        search,
        examples=(
            "compose search --base ./base --bank ./bank --examples few.jsonl --test heldout.jsonl --out runs/task",
            "compose search --base ./base --bank ./bank --examples few.jsonl --dry-run",
            "compose search --base B --bank D --examples f.jsonl --preselect embedding --retriever R --out runs/task",
            "compose search --demo list",
            "compose search --demo TASK --shots 5 --out runs/demo",
        ),
    )
)
