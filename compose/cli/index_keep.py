"""``compose index verify``, ``audit``, ``embed``, ``export``, ``import``, ``remove`` and ``gc``: keeping an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compose.cli.console import print_facts, print_json, print_table, say
from compose.cli.index_ask import encoder_named
from compose.cli.index_options import (
    FAILED,
    SCHEMA,
    BaseFilter,
    IndexPath,
    Names,
    counted,
    index_path,
    open_index,
)
from compose.cli.options import INPUTS, Force, Json
from compose.errors import DuplicateNameError
from compose.report.plain import NONE

if TYPE_CHECKING:
    from compose.hub_index.audit import AuditReport

FINDING = 4
"""Exit code of a finding at or above ``--fail-on``."""

File = Annotated[Path, typer.Argument(metavar="FILE", help="A JSONL file.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]


def verify(names: Names = None, index: IndexPath = None, json: Json = False) -> None:
    """Hash the files of adapters again and compare them with the index; check the index itself too.

    Exits with 1 when a file is missing or changed, or the index is damaged.
    """
    from compose.hub_index.verify import verify as run

    with open_index(index) as opened:
        found = run(opened, names or None)
        damage = opened.check()
    if json:
        adapters = [one._asdict() for one in found]
        print_json({"schema_version": SCHEMA, "index": str(index_path(index)), "adapters": adapters, "damage": damage})
    else:
        bad = [one for one in found if one.state in ("changed", "missing")]
        if bad:
            print_table(["adapter", "state", "detail"], [[one.name, one.state, one.detail] for one in bad])
        for line in damage:
            say(f"index: {line}")
        say(counted([one.state for one in found]), "bold")
    if damage or any(one.state in ("changed", "missing") for one in found):
        raise typer.Exit(FAILED)


def audit(
    names: Names = None,
    index: IndexPath = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Compare them with this base model (a folder or cached id).",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    fail_on: Annotated[
        Literal["low", "medium", "high", "critical"] | None,
        typer.Option("--fail-on", metavar="SEVERITY", help="Exit with 4 from here on: low, medium, high, critical."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Leave the index as it is.")] = False,
    json: Json = False,
) -> None:
    """Audit adapters of the index among their siblings there, and write findings and statistics into it.

    One that a hard rule refuses is quarantined with the reasons. Like compose audit NAME, for many.
    """
    from compose.hub_index.audit import store_audit
    from compose.hub_index.audit.run import audit as run
    from compose.hub_index.search import Filters

    with open_index(index, write=not dry_run) as opened:
        chosen = list(names) if names else [one.name for one in opened.ls(Filters(status="any")) if _has_files(one)]
        report = run(chosen, index=opened, base_model=base)
        for one in report.adapters if not dry_run else ():
            store_audit(opened, one)
    print_json(report.to_json()) if json else _show_audit(report)
    if fail_on is not None and report.at_least(fail_on):
        raise typer.Exit(FINDING)


def embed(
    index: IndexPath = None,
    encoder: Annotated[
        str,
        typer.Option(
            "--encoder",
            metavar="NAME",
            help="minilm, or a sentence-transformers model.",
            rich_help_panel=INPUTS,
        ),
    ] = "minilm",
    kind: Annotated[
        Literal["card", "examples"],
        typer.Option("--kind", metavar="KIND", help="What is embedded: card or examples.", rich_help_panel=INPUTS),
    ] = "card",
    again: Annotated[bool, typer.Option("--again", help="Also those that have such a vector.")] = False,
    json: Json = False,
) -> None:
    """Give adapters vectors, of what their cards say or of their examples, for queries with --encoder."""
    from compose.hub_index.embed import embed as run

    with open_index(index, write=True) as opened:
        done = run(opened, encoder_named(encoder), kind, again=again)
    facts = {"written": len(done.written), "had one": len(done.kept), "nothing to embed": list(done.without)}
    if json:
        print_json({"schema_version": SCHEMA, "encoder": encoder, "kind": kind, **done._asdict()})
        return
    print_facts({**facts, "nothing to embed": ", ".join(done.without) or None})


def export(
    file: File, index: IndexPath = None, base: BaseFilter = None, force: Force = False, json: Json = False
) -> None:
    """Write the index as JSONL, one adapter per line with its hash: the form to give away."""
    from compose.hub_index.exchange import export_jsonl
    from compose.hub_index.search import Filters

    if file.exists() and not force:
        raise DuplicateNameError(f"{file} exists; choose another file, or pass --force to replace it")
    with open_index(index) as opened:
        count = export_jsonl(opened, file, None if base is None else Filters(base=base, status="any"))
    if json:
        print_json({"schema_version": SCHEMA, "file": str(file), "adapters": count})
        return
    say(f"{count} adapters written to {file}")


def import_(
    file: File,
    index: IndexPath = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of adapters with the same name or content.")
    ] = False,
    json: Json = False,
) -> None:
    """Take in an exported JSONL, all of it or nothing; it is hearsay: verify and audit what you use.

    Paths are those of the machine it comes from; add the adapters' folders here with --replace to use them.
    """
    from compose.hub_index.exchange import import_jsonl

    with open_index(index, write=True, create=True) as opened:
        done = import_jsonl(opened, file, replace=replace)
    if json:
        print_json({"schema_version": SCHEMA, "adapters": [one._asdict() for one in done]})
        return
    say(counted([one.state for one in done]), "bold")


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Adapters.", show_default=False)],
    index: IndexPath = None,
    reason: Annotated[
        str, typer.Option("--reason", metavar="TEXT", help="Why; it stays until gc.")
    ] = "removed by hand",
    json: Json = False,
) -> None:
    """Take adapters out of the index; their files stay, gc deletes what is left in the index."""
    with open_index(index, write=True) as opened:
        opened.remove(names, reason=reason)
    if json:
        print_json({"schema_version": SCHEMA, "removed": list(names)})
        return
    say(f"removed: {', '.join(names)}")


def gc(
    index: IndexPath = None,
    dry_run: DryRun = False,
    compact: Annotated[bool, typer.Option("--compact", help="Give freed pages back to the file system.")] = False,
    json: Json = False,
) -> None:
    """Delete removed adapters, unused vectors, and converted files that no adapter of the index needs."""
    from compose.hub_index.converted import sweep_converted

    with open_index(index, write=not dry_run) as opened:
        swept = opened.gc(dry_run=dry_run, compact=compact)
        folders = sweep_converted(opened, dry_run=dry_run)
    if json:
        print_json({"schema_version": SCHEMA, "dry_run": dry_run, **swept._asdict(), "converted": folders})
        return
    print_facts(
        {
            "would go" if dry_run else "deleted": f"{len(swept.adapters)} adapters",
            "adapters": ", ".join(swept.adapters) or None,
            "files of vectors": len(swept.files) or None,
            "encoders": ", ".join(swept.encoders) or None,
            "converted folders": len(folders) or None,
        }
    )


def _has_files(one: object) -> bool:
    return bool(one.path) and one.status != "removed"  # type: ignore[attr-defined]


def _show_audit(report: AuditReport) -> None:
    rows = [
        [
            one.name,
            f"{one.siblings}, {one.state}" if one.state != "not read" else one.state,
            NONE if one.score is None else f"{one.score:.1f}",
            str(len(one.findings)),
            one.findings[0].severity if one.findings else NONE,
            "quarantined" if one.refused else NONE,
        ]
        for one in report.adapters
    ]
    print_table(["adapter", "siblings", ">score", ">findings", "worst", "hard"], rows)
    for one in report.adapters:
        for found in one.findings:
            if found.severity not in ("info", "low"):
                say(f"{one.name}: {found.severity}: {found.rule}: {found.detail}")
