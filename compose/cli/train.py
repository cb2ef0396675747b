"""``compose train``: a mixture of LoRA experts, trained on mixed-task records."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import fail, print_json
from compose.cli.options import INPUTS, OUTPUT, Banks, Base, Device, Force, Json

TRAINING = "Training"

PresetName = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="The mixture; 'list' names them.", rich_help_panel=TRAINING),
]
Config = Annotated[
    Path | None,
    typer.Option("-c", "--config", metavar="FILE", help="Recipe (YAML); options win.", rich_help_panel=INPUTS),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="JSONL with task, prompt, response; or a folder, a file per task; may be repeated.",
        rich_help_panel=INPUTS,
    ),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="FIELD=NAME", help="Column that holds a field; may be repeated.", rich_help_panel=INPUTS
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="OPTION=VALUE", help="An option of the preset; may be repeated.", rich_help_panel=TRAINING
    ),
]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimiser steps.", rich_help_panel=TRAINING)]
Epochs = Annotated[
    float | None,
    typer.Option("--epochs", help="Passes over the data, instead of steps. [1]", rich_help_panel=TRAINING),
]
Rate = Annotated[
    float | None, typer.Option("--learning-rate", "--lr", help="Highest rate. [0.001]", rich_help_panel=TRAINING)
]
ScheduleName = Annotated[
    Literal["constant", "linear", "cosine"] | None,
    typer.Option("--schedule", help="How the rate falls. [constant]", rich_help_panel=TRAINING),
]
Warmup = Annotated[int | None, typer.Option("--warmup", help="Steps of its rise. [0]", rich_help_panel=TRAINING)]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Records per step. [16]", rich_help_panel=TRAINING)
]
Accumulation = Annotated[
    int | None, typer.Option("--accumulation", help="Micro-batches per step. [1]", rich_help_panel=TRAINING)
]
SamplingBy = Annotated[
    Literal["proportional", "sqrt", "equal"] | None,
    typer.Option("--sampling", help="Shares of tasks. [proportional]", rich_help_panel=TRAINING),
]
MaxLength = Annotated[
    int | None, typer.Option("--max-length", help="Most tokens of a record.", rich_help_panel=TRAINING)
]
Truncate = Annotated[
    Literal["refuse", "prompt_left"] | None,
    typer.Option("--truncate", help="What to do with longer ones. [refuse]", rich_help_panel=TRAINING),
]
Precision = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--precision", help="Of the base model. [float32]", rich_help_panel=TRAINING),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", help="Of every random choice; a run for each, if repeated. [0]", rich_help_panel=TRAINING),
]
Checkpoints = Annotated[
    int, typer.Option("--checkpoint-every", min=0, help="Steps between checkpoints.", rich_help_panel=TRAINING)
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Run folder: mixture, history, recipe.", rich_help_panel=OUTPUT),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan and what it will cost; train nothing.", rich_help_panel=OUTPUT),
]


def train(  # noqa: PLR0913 - one parameter per option
    base: Base = None,
    bank: Banks = None,
    data: Data = None,
    column: Column = None,
    config: Config = None,
    device: Device = "cpu",
    preset: PresetName = None,
    settings: Settings = None,
    steps: Steps = None,
    epochs: Epochs = None,
    learning_rate: Rate = None,
    schedule: ScheduleName = None,
    warmup: Warmup = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    sampling: SamplingBy = None,
    max_length: MaxLength = None,
    truncate: Truncate = None,
    precision: Precision = None,
    seed: Seeds = None,
    checkpoint_every: Checkpoints = 100,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train a mixture of LoRA experts on records of several tasks.

    Gates over a bank of trained adapters, or gates and experts together: the preset decides. Writes a run folder
    that compose.engine.routed.open_routed puts back on the base model. Interrupted runs continue with --resume.
    """
    from compose.cli.train_request import TrainRequest, read_columns, read_options

    if preset == "list":
        _list_presets(as_json=json)
        return
    given: dict[str, Any] = {
        "preset": preset, "base": base, "bank": bank or None, "data": data or None, "out": out, "steps": steps,
        "epochs": epochs, "learning_rate": learning_rate, "schedule": schedule, "warmup": warmup,
        "batch_size": batch_size, "accumulation": accumulation, "max_length": max_length, "truncate": truncate,
        "precision": precision, "seeds": seed or None, "options": read_options(settings or ()) or None,
        "columns": read_columns(column or ()) or None, "sampling": None if sampling is None else {"by": sampling},
    }  # fmt: skip
    _alone()
    request = TrainRequest.read(
        config, given, device=device, checkpoint_every=checkpoint_every, resume=resume, force=force, dry_run=dry_run
    )
    try:
        _run(request, as_json=json)
    except KeyboardInterrupt:
        fail(request.resume_command(sys.argv[1:]))
        raise typer.Exit(130) from None


def _alone() -> None:
    """Raise where ``torchrun`` started several of us: each would train alone and write the same folder."""
    from compose.errors import IncompatibleError

    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise IncompatibleError(
            f"compose train runs in one process, and WORLD_SIZE is {world}; for several call compose.routers.train in "
            "a script that runs torch.distributed.init_process_group first (routers/README.md)"
        )


def _run(request: Any, *, as_json: bool) -> None:
    from compose.cli.train_result import show_plan, show_runs
    from compose.cli.train_run import plan_run, run_all

    if request.dry_run:
        plan = plan_run(request)
        print_json(plan) if as_json else show_plan(plan)
        return
    runs = run_all(request, command=["compose", *sys.argv[1:]])
    print_json({"runs": runs}) if as_json else show_runs(runs)


def _list_presets(*, as_json: bool) -> None:
    from compose.cli.train_result import preset_facts, show_presets

    presets = preset_facts()
    print_json({"presets": presets}) if as_json else show_presets(presets)


COMMANDS.register("train")(
    Command(
        train,
        examples=(
            "compose train --preset xlora --base ./base --bank ./bank --data mixed.jsonl --out runs/xlora",
            "compose train --preset molora --base ./base --data tasks/ --set num_experts=4 --out runs/molora",
            "compose train -c recipe.yaml --dry-run",
            "compose train --preset list",
        ),
    )
)
