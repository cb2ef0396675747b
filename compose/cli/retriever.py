"""``compose retriever``: what a saved retriever holds, and training the encoder of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import note, print_facts, print_json, print_table, say
from compose.cli.options import INPUTS, OUTPUT, Device, Force, Json
from compose.errors import ComposeError

TRAINING = "Training"

Folder = Annotated[Path | None, typer.Option("--retriever", metavar="FOLDER", help="A saved retriever to describe.")]
Examples = Annotated[
    list[Path] | None,
    typer.Option(
        "--examples",
        metavar="FILE",
        help="JSONL with task (or adapter) and input (or prompt); may be repeated.",
        rich_help_panel=INPUTS,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="NAME",
        help="A sentence-transformers model or folder. [all-MiniLM-L6-v2]",
        rich_help_panel=INPUTS,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="Instruction before every text; saved too.", rich_help_panel=TRAINING
    ),
]
Unseen = Annotated[
    str,
    typer.Option(
        "--unseen",
        metavar="SHARE|NAMES",
        help="Tasks held out whole: a share, or names with commas.",
        rich_help_panel=TRAINING,
    ),
]
HeldOut = Annotated[
    float,
    typer.Option("--held-out", metavar="SHARE", help="Of every task's inputs: only ask.", rich_help_panel=TRAINING),
]
Rounds = Annotated[
    int, typer.Option("--rounds", metavar="N", help="How often every input is used.", rich_help_panel=TRAINING)
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", help="Pairs of different tasks per step.", rich_help_panel=TRAINING)
]
LearningRate = Annotated[float, typer.Option("--lr", help="Peak learning rate.", rich_help_panel=TRAINING)]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", help="Cut texts to N tokens. [the model's]", rich_help_panel=TRAINING),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.", rich_help_panel=TRAINING)]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Encoder's folder, with report.json.", rich_help_panel=OUTPUT),
]


def retriever(context: typer.Context, retriever: Folder = None, json: Json = False) -> None:
    """Describe a saved retriever, or train the encoder of one.

    `compose retrieve --save` fits and saves retrievers; `compose retriever train` makes better encoders for them.
    """
    if context.invoked_subcommand is not None:
        return
    if retriever is None:
        raise ComposeError("nothing to do; give --retriever FOLDER to describe one, or the word train")
    from compose.retriever.storage import read_facts

    facts = read_facts(retriever)
    shown: dict[str, Any] = {
        "adapters": len(facts["names"]),
        "method": facts["method"],
        "options": facts["options"],
        "vectors": sum(facts["counts"]),
        "encoder": facts["encoder"],
        "scope": facts["scope"],
        "names": facts["names"],
    }
    if json:
        print_json(shown)
        return
    encoder, options = shown.pop("encoder"), shown.pop("options")
    shown |= {
        "method": " ".join([facts["method"], *(f"{name}={value}" for name, value in options.items())]),
        "names": ", ".join(facts["names"]),
        "scope": None
        if facts["scope"] is None
        else "below {threshold:.4g} ({kind}): refused".format(**facts["scope"]),
        "encoder": encoder.get("id"),
        "prompt": repr(encoder.get("prompt")),
        "fingerprint": encoder.get("fingerprint"),
    }
    print_facts(shown)


def train(  # noqa: PLR0913 - one parameter per option
    examples: Examples = None,
    encoder: Model = None,
    prompt: Prompt = None,
    unseen: Unseen = "0.2",
    held_out: HeldOut = 0.2,
    rounds: Rounds = 4,
    batch_size: BatchSize = 64,
    lr: LearningRate = 2e-5,
    max_length: MaxLength = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train an encoder so that inputs of one task lie close together, and measure it on tasks it never saw.

    Two inputs of a task are a positive pair, pairs of other tasks its negatives. The result is the folder of a
    sentence-transformers model that carries its prompt: give it to `compose retrieve --encoder`.
    """
    missing = [name for name, value in (("--examples FILE", examples), ("--out DIR", out)) if not value]
    if missing or examples is None or out is None:
        raise ComposeError(f"missing {' and '.join(missing)}")
    if out.exists() and not force:
        raise ComposeError(f"--out: {out} exists; choose another folder, or pass --force to replace it")
    from compose.retriever.encoders import DEFAULT_MODEL, TASK_PROMPT
    from compose.retriever.task_texts import read_task_texts
    from compose.retriever.training import TrainingSettings, train_retriever

    settings = TrainingSettings(
        model=DEFAULT_MODEL if encoder is None else encoder,
        prompt=TASK_PROMPT if prompt is None else prompt,
        unseen=_unseen(unseen),
        held_out=held_out,
        rounds=rounds,
        batch_size=batch_size,
        learning_rate=lr,
        max_length=max_length,
        seed=seed,
        device=device,
    )
    trained = train_retriever(read_task_texts(examples), settings, out=out, overwrite=force, progress=note)
    if json:
        print_json({**trained.report, "folder": str(out)})
        return
    _show(trained.report)
    say(f"wrote {out}; use it with: compose retrieve --encoder {out}")


def _unseen(given: str) -> float | tuple[str, ...]:
    try:
        return float(given)
    except ValueError:
        return tuple(name.strip() for name in given.split(",") if name.strip())


def _show(report: dict[str, Any]) -> None:
    rows = []
    for group in report["before"]:
        for method in (name for name in report["before"][group] if name != "queries"):
            pair = [report[when][group][method] for when in ("before", "after")]
            cells = [
                f"{100 * before:.1f} -> {100 * after:.1f}"
                for before, after in zip(*map(dict.values, pair), strict=True)
            ]
            rows.append([f"{group} ({report['before'][group]['queries']} queries)", method, *cells])
    print_table(["tasks", "embedding", ">top-1 %", ">top-3 %", ">top-5 %"], rows, title="Recall, before -> after")


COMMANDS.register("retriever")(
    Command(
        retriever,
        examples=(
            "compose retriever --retriever runs/retriever",
            "compose retriever train --examples tasks.jsonl --out runs/encoder",
        ),
        subcommands={
            "train": Command(
                train,
                examples=(
                    "compose retriever train --examples tasks.jsonl --out runs/encoder",
                    "compose retriever train --examples tasks.jsonl --unseen sums,dates --rounds 8 --out runs/encoder",
                    "compose retrieve 'Sort: b a' --examples labelled.jsonl --encoder runs/encoder",
                ),
            )
        },
    )
)
