"""``compose retrieve``: the adapters of a bank that fit a text, by the embedding of the text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import note, print_json, print_table
from compose.cli.options import INPUTS, OUTPUT, Banks, Base, Device, Dtype, Force, Json
from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.retriever.retriever import Retrieved, Retriever

FIT = "Fitting a retriever"
_SHOWN_TEXT = 40

Texts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TEXT]...", help="Texts; - reads one a line from standard input.", show_default=False),
]
RetrieverFolder = Annotated[
    Path | None,
    typer.Option("--retriever", metavar="FOLDER", help="A saved retriever.", rich_help_panel=INPUTS),
]
Top = Annotated[int, typer.Option("--top", "-k", min=1, help="Adapters per text.", rich_help_panel=OUTPUT)]
Task = Annotated[bool, typer.Option("--task", help="All texts are inputs of one task: retrieve once, by their mean.")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="NAME", help="Pass over an adapter; may be repeated.")
]
Examples = Annotated[
    Path | None,
    typer.Option("--examples", metavar="FILE", help="JSONL: input, and adapter (or task).", rich_help_panel=FIT),
]
EncoderName = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        metavar="NAME",
        help="A sentence-transformers model or folder (default all-MiniLM-L6-v2), or hidden-states of --base.",
        rich_help_panel=FIT,
    ),
]
Method = Annotated[
    str, typer.Option("--method", metavar="NAME", help="Adapter embedding: auto, lda, mean ...", rich_help_panel=FIT)
]
Save = Annotated[
    Path | None,
    typer.Option("--save", metavar="FOLDER", help="Keep what was fitted, for --retriever.", rich_help_panel=FIT),
]


def retrieve(  # noqa: PLR0913 - one parameter per option
    texts: Texts = None,
    retriever: RetrieverFolder = None,
    bank: Banks = None,
    base: Base = None,
    demo: Annotated[bool, typer.Option("--demo", help="Use the shipped bank and the inputs of its tasks.")] = False,
    top: Top = 5,
    task: Task = False,
    exclude: Exclude = None,
    examples: Examples = None,
    encoder: EncoderName = None,
    method: Method = "auto",
    save: Save = None,
    force: Force = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Name the adapters that fit each text, best first.

    The retriever is a folder that was saved, or is fitted here on a few inputs of every adapter's task: --examples has
    a line per input, with the adapter's name. With --bank only names of its adapters are allowed. --base is needed
    where texts are embedded by the base model's own hidden states.
    """
    prompts = _texts(texts, fits=save is not None)
    _check_sources(retriever, demo, {"--bank": bank, "--examples": examples, "--encoder": encoder, "--save": save})
    if save is not None and save.exists() and not force:
        raise ComposeError(f"--save: {save} exists; give another folder, or pass --force to replace it")
    from compose.cli.retriever_source import RetrieverSource

    base_path = _demo_base() if demo and base is None else base
    source = RetrieverSource(retriever, _bank_names(bank), examples, demo, encoder, method)
    opened = source.open(_load_base(base_path, device, dtype))
    if save is not None:
        note(f"wrote {opened.save(save, overwrite=force)}")
    if not prompts:
        return
    found = _found(opened, prompts, top, exclude, task=task)
    shown = [" + ".join(prompts)] if task else prompts
    if json:
        print_json(_plain(opened, found, shown, prompts if task else None))
        return
    _show(found, shown)


def _found(retriever: Retriever, texts: list[str], top: int, exclude: list[str] | None, *, task: bool) -> Retrieved:
    if task:
        if exclude:
            raise ComposeError("--exclude goes with single texts; leave out --task, or take the next name of its list")
        return retriever.top_for_task(texts, top)
    return retriever.top(texts, top, [exclude] * len(texts) if exclude else None)


def _show(found: Retrieved, texts: list[str]) -> None:
    rows = []
    for text, names, scores, rejected in zip(texts, found.names, found.scores, found.rejected, strict=True):
        short = text if len(text) <= _SHOWN_TEXT else text[: _SHOWN_TEXT - 3] + "..."
        for place, name in enumerate(names):
            rows.append([short if not place else "", str(place + 1), name, f"{scores[place]:.4g}"])
        if not names:
            rows.append([short, "-", "(out of scope)" if rejected else "(none)", "-"])
    print_table(["text", ">rank", "adapter", ">score"], rows)


def _plain(retriever: Retriever, found: Retrieved, texts: list[str], parts: list[str] | None) -> dict[str, Any]:
    from compose.retriever.storage import describe, method_name

    results = [
        {
            "text": text if parts is None else parts,
            "adapters": [{"name": name, "score": float(score)} for name, score in zip(names, scores, strict=False)],
            "rejected": bool(rejected),
        }
        for text, names, scores, rejected in zip(texts, found.names, found.scores, found.rejected, strict=True)
    ]
    return {
        "encoder": describe(retriever.encoder),
        "method": method_name(retriever.method),
        "known": len(retriever.names),
        "results": results,
    }


def _texts(given: list[str] | None, *, fits: bool) -> list[str]:
    texts = [text for text in given or [] if text != "-"]
    if "-" in (given or []):
        texts += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts and not fits:
        raise ComposeError("no texts; give TEXT, or - to read one a line from standard input")
    if any(not text.strip() for text in texts):
        raise ComposeError("a text is empty; give each some words")
    return texts


def _check_sources(retriever: Path | None, demo: bool, fit: dict[str, Any]) -> None:
    given = [name for name, value in fit.items() if value]
    if retriever is not None and (demo or given):
        raise ComposeError(f"--retriever is fitted already; leave out {'--demo' if demo else given[0]}")
    own = [name for name in ("--bank", "--examples") if name in given]
    if demo and own:
        raise ComposeError(f"--demo brings its own bank and examples; leave out {own[0]}")


def _demo_base() -> str:
    from compose.cli.demo_files import demo_paths

    return str(demo_paths()[0])


def _bank_names(folders: list[Path] | None) -> tuple[str, ...] | None:
    if not folders:
        return None
    from compose.bank import Bank

    return Bank.open(folders).names


def _load_base(base: str | None, device: str, dtype: str) -> Any:
    if base is None:
        return None

    def load() -> tuple[Any, Any]:
        from compose.cli.loading import load_base

        loaded = load_base(base, device=device, dtype=dtype)
        return loaded.model, loaded.tokenizer

    return load


COMMANDS.register("retrieve")(
    Command(
        retrieve,
        examples=(
            "compose retrieve 'Sort the words: pear fig apple' --demo",
            "compose retrieve 'Sort: b a' --bank ./bank --examples labelled.jsonl --top 3 --save runs/retriever",
            "compose retrieve - --retriever runs/retriever --json < texts.txt",
            "compose retrieve 'Sort: b a' 'Sort: d c' --task --retriever runs/retriever",
        ),
    )
)
