"""``compose audit``: what is wrong with an adapter's files, and what is unusual about its weights among its kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import print_facts, print_json, print_table, say
from compose.cli.options import INPUTS, OUTPUT, Base, Json
from compose.report.plain import NONE

if TYPE_CHECKING:
    from compose.hub_index.audit import AdapterAudit, AuditReport
    from compose.hub_index.store import Index

FAILED = 4
"""Exit code of a finding at or above ``--fail-on``."""


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PATH|NAME", help="A folder (one adapter or many), or a name in the index.", show_default=False
        ),
    ],
    index: Annotated[
        Path | None,
        typer.Option(
            "--index",
            metavar="FILE",
            envvar="COMPOSE_INDEX",
            show_default=False,
            help="Index whose adapters are siblings; for a name, adapters.db in your data folder by default.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    base: Base = None,
    compose_: Annotated[
        str | None,
        typer.Option(
            "--compose",
            metavar="SUM",
            help="Audit a composed delta of the folder's adapters: '0.6*a + 0.4*b'.",
            rich_help_panel=INPUTS,
        ),
    ] = None,
    allow_full_modules: Annotated[
        bool,
        typer.Option("--allow-full-modules", help="Whole weights (modules_to_save) are expected."),
    ] = False,
    fail_on: Annotated[
        Literal["low", "medium", "high", "critical"] | None,
        typer.Option(
            "--fail-on",
            metavar="SEVERITY",
            help="low, medium, high or critical: exit with 4 from there on.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Audit an adapter, a folder of adapters, or a composed delta. Nothing unsafe is loaded and nothing is run.

    Structure is judged by rules; statistics only against at least 20 adapters of the same base, targets and ranks, in
    the same folder or in the index. An adapter without findings is not proven harmless.
    """
    report = _report(target, index, base, compose_, allow_full_modules)
    print_json(report.to_json()) if json else _show(report)
    if fail_on is not None and report.at_least(fail_on):
        raise typer.Exit(FAILED)


def _report(
    target: str, index_path: Path | None, base: str | None, text: str | None, full_modules: bool
) -> AuditReport:
    from compose.bank import Bank
    from compose.engine.merge_weights import parse_expression
    from compose.hub_index.audit import audit as run
    from compose.hub_index.audit import audit_composition

    index = _open(index_path, target)
    try:
        if text is None:
            return run(target, index=index, base_model=base, full_modules=full_modules)
        bank = Bank.open(Path(target))
        return audit_composition(bank, parse_expression(text), index=index, base_model=base)
    finally:
        if index is not None:
            index.close()


def _open(path: Path | None, target: str) -> Index | None:
    from compose.hub_index.place import default_index
    from compose.hub_index.store import Index

    if path is None and not Path(target).exists() and default_index().exists():
        path = default_index()
    return None if path is None else Index.open(path, readonly=True)


def _show(report: AuditReport) -> None:
    if len(report.adapters) == 1 and report.composition is None:
        _show_adapter(report.adapters[0])
    else:
        _show_adapters(report)
    if report.composition is not None:
        _show_composition(report)
    _show_findings(report)


def _show_adapter(one: AdapterAudit) -> None:
    norm = sum(module.fro**2 for module in one.statistics.values()) ** 0.5
    print_facts(
        {
            "adapter": one.name,
            "folder": one.folder or None,
            "base": one.base or "unknown",
            "sha256": one.sha256 or None,
            "targets": len(one.statistics) or None,
            "norm": f"{norm:.4g} (Frobenius, over all targets)" if one.statistics else None,
            "siblings": _state(one),
            "score": None if one.score is None else f"{one.score:.1f} (p = {one.p:.3f} among its siblings)",
            "verdict": "refused" if one.refused else "no hard finding",
        }
    )
    if one.outliers:
        rows = [
            [found.feature, found.kind, f"{found.score:.1f}", f"{found.z:+.1f}", found.module or NONE]
            for found in one.outliers[:6]
        ]
        print_table(["statistic", "of", ">score", ">z", "target"], rows, title="Among its siblings")


def _show_adapters(report: AuditReport) -> None:
    rows = [
        [
            one.name,
            _state(one),
            NONE if one.score is None else f"{one.score:.1f}",
            str(len(one.findings)),
            one.findings[0].severity if one.findings else NONE,
            "refused" if one.refused else NONE,
        ]
        for one in report.adapters
    ]
    print_table(["adapter", "siblings", ">score", ">findings", "worst", "hard"], rows, title=report.target)


def _state(one: AdapterAudit) -> str:
    return f"{one.siblings}, {one.state}" if one.state != "not read" else one.state


def _show_composition(report: AuditReport) -> None:
    from compose.report.svg import number

    found = report.composition
    if found is None:
        return
    state = f"compared with {found.draws} compositions of siblings" if found.draws else "no reference"
    say(f"Composed delta: {report.target} ({state})", "bold")
    rows: list[list[str]] = [
        [
            one.layer or NONE,
            number(one.norm),
            number(one.largest),
            one.member,
            NONE if one.ratio is None else f"{one.ratio:.2f}",
        ]
        for one in found.layers
    ]
    print_table(["layer", ">|sum|", ">largest member", "which", ">ratio"], rows)


def _show_findings(report: AuditReport) -> None:
    from compose.hub_index.audit import is_hard

    rows: list[list[Any]] = [
        [one.severity + (" !" if is_hard(one) else ""), one.rule, name or "(sum)", one.detail]
        for name, one in report.findings
    ]
    if not rows:
        say("No findings. That does not prove an adapter harmless.")
        return
    order = ("critical", "high", "medium", "low", "info")
    rows.sort(key=lambda row: order.index(row[0].split(" ")[0]))
    print_table(["severity", "rule", "adapter", "what"], rows, title="Findings (! = not to be loaded)")


COMMANDS.register("audit")(
    Command(
        audit,
        examples=(
            "compose audit bank/reverse-words --fail-on high",
            "compose audit bank --base ./base --json",
            "compose audit some-adapter --index adapters.db",
            "compose audit bank --compose '0.6*a + 0.4*b'",
        ),
    )
)
