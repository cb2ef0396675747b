"""``compose index``: adapters taken in, found by words, filters and vectors, verified and audited."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import note, print_facts, print_json, print_table, say
from compose.cli.index_ask import ls, query, show
from compose.cli.index_keep import audit, embed, export, gc, import_, remove, verify
from compose.cli.index_options import DANGEROUS, REFUSED, SCHEMA, IndexPath, counted, index_path, open_index
from compose.cli.options import INPUTS, Json
from compose.errors import ComposeError, HubIndexError
from compose.report.plain import NONE

if TYPE_CHECKING:
    from compose.hub_index.ingest import Options, Outcome
    from compose.hub_index.store import Index


Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="A folder, a tree of folders, a JSONL file of descriptions, or a Hugging Face id owner/name.",
        show_default=False,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="Of a single adapter; its folder's by default.", rich_help_panel=INPUTS
    ),
]
FitsBase = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Refuse what does not fit this base model (a folder or cached id).",
        rich_help_panel=INPUTS,
    ),
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Take the place of an adapter with the same name or content.")
]
QuarantineAt = Annotated[
    str,
    typer.Option("--quarantine-at", metavar="SEVERITY", help="Findings that quarantine: low, medium, high, critical."),
]
FullModules = Annotated[
    bool,
    typer.Option(
        "--allow-full-modules",
        help="Take adapters that replace whole weights (modules_to_save); composition leaves these out.",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Convert adapter_model.bin in a bounded process; only for files you trust.",
        rich_help_panel=DANGEROUS,
    ),
]


def index(context: typer.Context, index: IndexPath = None, json: Json = False) -> None:
    """Keep and search an index of adapters: one SQLite file, opened and queried without torch.

    Without a further word: where the index is and what it holds.
    """
    if context.invoked_subcommand is not None:
        return
    with open_index(index) as opened:
        info = opened.info()
    facts = {
        "index": str(index_path(index)),
        "bytes": info.num_bytes,
        "statuses": dict(info.statuses),
        "bases": dict(info.bases),
        "encoders": [{"encoder_id": one.encoder_id, "kind": one.kind, "dim": one.dim} for one in info.encoders],
    }
    if json:
        print_json({"schema_version": SCHEMA, **facts})
        return
    print_facts(
        {
            "index": facts["index"],
            "size": f"{info.num_bytes / 1e6:.1f} MB",
            "adapters": ", ".join(f"{count} {status}" for status, count in info.statuses.items()),
            "bases": ", ".join(f"{base or 'unknown'} ({count})" for base, count in info.bases.items()) or None,
            "vectors": ", ".join(f"{one.encoder_id} ({one.kind})" for one in info.encoders) or None,
        }
    )


def add(
    sources: Sources,
    index: IndexPath = None,
    name: Name = None,
    base: FitsBase = None,
    replace: Replace = False,
    quarantine_at: QuarantineAt = "high",
    allow_full_modules: FullModules = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
) -> None:
    """Take adapters in: each becomes active or quarantined, with the reasons, or is refused; never half.

    Files are hashed, checked by the rules of compose audit and described with what their cards say; nothing is copied
    but what --allow-pickle converts. Exits with 3 when an adapter was refused; the others are in the index.
    """
    options = _options(base, quarantine_at, allow_full_modules, allow_pickle, replace)
    with open_index(index, write=True, create=True) as opened:
        outcomes = _add_all(opened, sources, name, options)
    if json:
        adapters = [one._asdict() for one in outcomes]
        states = [one.state for one in outcomes]
        counts = {state: states.count(state) for state in dict.fromkeys(states)}
        print_json({"schema_version": SCHEMA, "index": str(index_path(index)), "counts": counts, "adapters": adapters})
    else:
        _show_outcomes(outcomes)
    if any(one.state == "refused" for one in outcomes):
        raise typer.Exit(REFUSED)


def _options(base: str | None, quarantine_at: str, full_modules: bool, allow_pickle: bool, replace: bool) -> Options:
    from compose.hub_index.audit.base_model import BaseModel
    from compose.hub_index.ingest import Options

    if quarantine_at not in ("low", "medium", "high", "critical"):
        raise HubIndexError(f"--quarantine-at must be low, medium, high or critical, got {quarantine_at!r:.80}")
    return Options(
        base=None if base is None else BaseModel.open(base),
        full_modules=full_modules,
        allow_pickle=allow_pickle,
        quarantine_at=quarantine_at,  # type: ignore[arg-type]
        replace=replace,
    )


def _add_all(index: Index, sources: list[str], name: str | None, options: Options) -> list[Outcome]:
    """Take in all sources; of several, one that cannot be looked at is an outcome beside the others.

    Raises:
        ComposeError: The only source cannot be looked at.
    """
    from compose.hub_index.ingest import Outcome

    outcomes: list[Outcome] = []
    for source in sources:
        try:
            outcomes += _add_source(index, source, name, options)
        except ComposeError as error:
            if len(sources) == 1:
                raise
            outcomes.append(Outcome(source, "refused", source, (str(error),), "source"))
    return outcomes


def _add_source(index: Index, source: str, name: str | None, options: Options) -> list[Outcome]:
    """Take in one source, whatever it is; a path that exists comes before a Hugging Face id.

    Raises:
        HubIndexError: There is no such thing.
    """
    from compose.hub_index.descriptions import add_descriptions
    from compose.hub_index.hub_repo import fetch, parse_repo
    from compose.hub_index.ingest import add_file, add_tree

    path = Path(source).expanduser()
    if path.is_dir():
        return add_tree(index, path, options, name=name)
    if path.is_file():
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return add_descriptions(index, path, options)
        return [add_file(path)]
    repo = parse_repo(source)
    if repo is None:
        raise HubIndexError(
            f"{source!r:.200}: neither a folder, nor a file, nor a Hugging Face id (owner/name or owner/name@revision)"
        )
    note(f"{repo.repo_id}: looking it up")
    return add_tree(index, fetch(repo, allow_pickle=options.allow_pickle), options, name=name)


def _show_outcomes(outcomes: list[Outcome]) -> None:
    rows = [[one.name or NONE, one.state, one.code or NONE, one.place] for one in outcomes]
    print_table(["adapter", "state", "code", "from"], rows)
    for one in outcomes:
        for reason in one.reasons:
            say(f"{one.name or one.place}: {one.state}: {reason}")
    say(counted([one.state for one in outcomes]), "bold")
    for one in outcomes:
        for remark in one.notes:
            note(f"note: {one.name}: {remark}")


COMMANDS.register("index")(
    Command(
        index,
        examples=("compose index add ./bank", "compose index query 'sort words' --base MODEL", "compose index"),
        subcommands={
            "add": Command(
                add,
                examples=(
                    "compose index add ./bank",
                    "compose index add owner/name@main --base ./base",
                    "compose index add descriptions.jsonl",
                ),
            ),
            "ls": Command(ls, examples=("compose index ls", "compose index ls --base gpt2 --rank 4-16 --json")),
            "show": Command(show, examples=("compose index show sort_words",)),
            "query": Command(
                query,
                examples=(
                    "compose index query 'sort words'",
                    "compose index query 'sums' --base gpt2 --license mit --score 'gsm8k:exact_match>=0.4'",
                    "compose index query 'turn dates round' --encoder minilm",
                ),
            ),
            "embed": Command(
                embed, examples=("compose index embed --encoder minilm", "compose index embed --kind examples")
            ),
            "verify": Command(verify, examples=("compose index verify", "compose index verify sort_words --json")),
            "audit": Command(audit, examples=("compose index audit", "compose index audit --fail-on high")),
            "export": Command(export, examples=("compose index export adapters.jsonl",)),
            "import": Command(import_, examples=("compose index import adapters.jsonl",)),
            "remove": Command(remove, examples=("compose index remove sort_words",)),
            "gc": Command(gc, examples=("compose index gc --dry-run", "compose index gc")),
        },
    )
)
