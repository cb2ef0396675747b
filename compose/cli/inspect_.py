"""``compose inspect``: what an adapter or a bank holds, and what is wrong with it, from headers alone.

The file's name carries an underscore because a module ``inspect.py`` would hide the standard library's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import fail, note, print_facts, print_json, print_table, say
from compose.errors import AdapterFormatError, IncompatibleError
from compose.report.plain import NONE


def inspect(
    path: Annotated[
        Path, typer.Argument(help="An adapter folder, or a folder of adapter folders.", show_default=False)
    ],
    norms: Annotated[
        bool, typer.Option("--norms", help="Read the weights: norms of the deltas, and SHA-256.")
    ] = False,
    hash_files: Annotated[bool, typer.Option("--hash", help="SHA-256 of the weight files.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show targets, ranks, scalings, dtypes, sizes, the base model and every problem of an adapter or a bank.

    Only headers are read unless --norms or --hash asks for the weights. An adapter with a problem exits with 2; a bank
    lists its broken adapters and exits with 0 as long as one is usable.
    """
    from compose.cli.adapter_facts import adapter_facts
    from compose.formats import discover

    folders = discover(path)
    if folders == [path]:
        facts = adapter_facts(path, norms=norms, hash_files=hash_files)
        print_json(facts) if json else _show_adapter(facts)
        if facts["problems"]:
            raise typer.Exit(2)
        return
    facts = bank_facts(path, folders, norms=norms, hash_files=hash_files)
    print_json(facts) if json else _show_bank(facts)
    if not facts["usable"]:
        raise typer.Exit(2)


def bank_facts(path: Path, folders: list[Path], *, norms: bool, hash_files: bool) -> dict[str, Any]:
    """Return what is known of a bank: one entry per adapter, what they share, and the problems by folder."""
    from compose.bank import Bank
    from compose.cli.adapter_facts import adapter_facts

    adapters = [adapter_facts(folder, norms=norms, hash_files=hash_files) for folder in folders]
    problems = {one["folder"]: "; ".join(one["problems"]) for one in adapters if one["problems"]}
    facts: dict[str, Any] = {"kind": "bank", "folder": str(path), "adapters": adapters, "usable": 0, "base": None}
    try:
        bank = Bank.open([folder for folder in folders if str(folder) not in problems], strict=False)
    except (IncompatibleError, AdapterFormatError) as error:
        problems["(bank)"] = str(error)
    else:
        problems |= bank.problems
        facts |= {"usable": len(bank), "base": bank.base or None, "targets": len(bank.targets)}
    return {**facts, "bytes": sum(one["bytes"] or 0 for one in adapters), "problems": problems}


def _show_adapter(facts: dict[str, Any]) -> None:
    from compose.report.html import size

    print_facts(
        {
            "adapter": facts["name"],
            "folder": facts["folder"],
            "format": facts["format"],
            "base": facts["base"] or "unknown",
            "targets": f"{facts['targets_count']} modules, rank {facts['rank']}" if facts["targets"] else None,
            "scaling": facts["scaling"],
            "dtype": facts["dtype"],
            "size": None if facts["bytes"] is None else f"{size(facts['bytes'])}, {facts['parameters']:,} parameters",
            "modules_to_save": ", ".join(facts["modules_to_save"]) or None,
            "sha256": facts["sha256"],
            "norm": None if facts["norm"] is None else f"{facts['norm']:.4g} (Frobenius, over all targets)",
        }
    )
    if facts["targets"]:
        rows = [
            [
                row["pattern"],
                str(row["count"]),
                row["kind"],
                row["shape"],
                row["rank"],
                row["scaling"],
                row["norm"] or "",
            ]
            for row in facts["groups"]
        ]
        print_table(["target (* = any number)", ">modules", "kind", "shape", ">rank", ">scaling", ">norm"], rows)
    for remark in facts["notes"]:
        note(f"note: {remark}")
    for problem in facts["problems"]:
        fail(problem)


def _show_bank(facts: dict[str, Any]) -> None:
    from compose.report.html import size

    say(
        f"{facts['folder']}: {facts['usable']} of {len(facts['adapters'])} adapters usable, {size(facts['bytes'])}",
        "bold",
    )
    say(f"base: {facts['base'] or 'unknown'}")
    rows = [
        [
            one["name"],
            str(one["targets_count"] or NONE),
            one["rank"] or NONE,
            one["scaling"] or NONE,
            one["dtype"] or NONE,
            NONE if one["bytes"] is None else size(one["bytes"]),
            NONE if one["norm"] is None else f"{one['norm']:.4g}",
            (one["sha256"] or NONE)[:12],
            "problem" if one["problems"] else f"{len(one['notes'])} notes" if one["notes"] else "ok",
        ]
        for one in facts["adapters"]
    ]
    print_table(["adapter", ">targets", ">rank", ">scaling", "dtype", ">size", ">norm", "sha256", "state"], rows)
    if facts["problems"]:
        say(f"Problems ({len(facts['problems'])}):", "bold")
        for problem in facts["problems"].values():
            say(f"  {problem}")


COMMANDS.register("inspect")(
    Command(
        inspect,
        examples=("compose inspect bank/reverse-words", "compose inspect bank --norms", "compose inspect bank --json"),
    )
)
