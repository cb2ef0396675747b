"""``compose eval``: trained routers beside what they have to beat, on the same records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import fail, note, print_json
from compose.cli.options import INPUTS, OUTPUT, Banks, Base, Device, Dtype, Force, Json

COMPARED = "Compared"
ONE = "One LoRA"

Routers = Annotated[
    list[Path] | None,
    typer.Option(
        "--router",
        metavar="DIR",
        help="A trained router's folder, or a folder of seed-N; may be repeated.",
        rich_help_panel=INPUTS,
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Records that are scored: JSONL with task, prompt, response; may be repeated.",
        rich_help_panel=INPUTS,
    ),
]
Choose = Annotated[
    list[Path] | None,
    typer.Option(
        "--choose",
        metavar="PATH",
        help="Other records, by which the merge and the gates per task are chosen.",
        rich_help_panel=INPUTS,
    ),
]
TrainOn = Annotated[
    list[Path] | None,
    typer.Option("--train", metavar="PATH", help="Records that one LoRA is trained on.", rich_help_panel=INPUTS),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="FIELD=NAME", help="Column that holds a field; may be repeated.", rich_help_panel=INPUTS
    ),
]
Merges = Annotated[
    str | None,
    typer.Option(
        "--merges",
        metavar="NAMES",
        help="Merge methods that compete, with commas, or none. [sum,ties,dare_ties,tsvm]",
        rich_help_panel=COMPARED,
    ),
]
MergeRank = Annotated[int, typer.Option("--merge-rank", min=1, help="Rank of merges.", rich_help_panel=COMPARED)]
Ablations = Annotated[
    bool,
    typer.Option(
        "--ablations/--no-ablations",
        help="Random gates, gates of other rows, gates per task.",
        rich_help_panel=COMPARED,
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe", metavar="FILE", help="How it is trained. [recipe.json of the first router]", rich_help_panel=ONE
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Train it in one stage of so many steps.", rich_help_panel=ONE)
]
Rate = Annotated[
    float | None,
    typer.Option("--learning-rate", "--lr", help="Its highest rate. [the recipe's]", rich_help_panel=ONE),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", help="One LoRA for each; may be repeated. [0, 1, 2]", rich_help_panel=ONE),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder of rows, result, report.", rich_help_panel=OUTPUT),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted comparison.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be compared; score nothing.", rich_help_panel=OUTPUT)
]


def evaluate(  # noqa: PLR0913 - one parameter per option
    base: Base = None,
    bank: Banks = None,
    router: Routers = None,
    data: Data = None,
    choose: Choose = None,
    train: TrainOn = None,
    column: Column = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    merges: Merges = None,
    merge_rank: MergeRank = 64,
    ablations: Ablations = True,
    recipe: Recipe = None,
    steps: Steps = None,
    learning_rate: Rate = None,
    seed: Seeds = None,
    out: Out = None,
    resume: Resume = False,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Compare routers with what they have to beat: base, average, merge, own adapters, one LoRA, random gates.

    Scores are exact matches of generated text, means over tasks; folders of one preset trained alike with other seeds
    are seeds of one contender. A router that does not beat a rival by more than the spread over seeds is told so.
    """
    from compose.cli.eval_request import EvalRequest

    options: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("json", "EvalRequest")}
    request = EvalRequest.read(**options)
    try:
        _run(request, as_json=json)
    except KeyboardInterrupt:
        fail(request.resume_command(sys.argv[1:]))
        raise typer.Exit(130) from None


def _run(request: Any, *, as_json: bool) -> None:
    from compose.cli.eval_result import show_plan, show_result
    from compose.cli.eval_run import plan, run

    if request.dry_run:
        planned = plan(request)
        print_json(planned) if as_json else show_plan(planned)
        return
    result = run(request, command=["compose", *sys.argv[1:]])
    if as_json:
        print_json(result)
    else:
        show_result(result)
    note(f"wrote {request.out}")


COMMANDS.register("eval")(
    Command(
        evaluate,
        examples=(
            "compose eval --base ./base --bank ./bank --router runs/xlora --data test.jsonl --out runs/eval",
            "compose eval --base ./base --bank ./bank --router runs/xlora --data test.jsonl --dry-run",
            "compose eval --base ./base --router runs/molora --data test.jsonl --train mixed.jsonl --out runs/eval",
        ),
    )
)
