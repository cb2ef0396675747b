"""What a search prints when it is done, and what a dry run prints instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compose.cli.console import print_facts, print_table, say
from compose.report.plain import NONE

Report = Mapping[str, Any]

SHOWN_WEIGHTS = 10


def show_run(report: Report, folder: str | None) -> None:
    """Print choice and reason, controls, weights, cost and where the files are."""
    from compose.report.html import CHOICES, duration, sentence, size

    search, output = report["search"], report["output"]
    say(CHOICES.get(search["choice"], search["choice"]), "bold")
    say(sentence(search["reason"]))
    say("")
    show_controls(report)
    show_weights(report)
    print_facts(
        {
            "ran": search["ran"],
            "cost": f"{search['cost']:.1f} forward-equivalents, {search['evaluations']} evaluations, "
            f"{duration(search['seconds'])}",
            "adapter": None
            if output is None
            else f"{output['targets']} targets, rank {_range(output['rank_min'], output['rank_max'])}, "
            f"{size(output['bytes'])}, combine {output['combine']!r}",
            "folder": folder,
            "report": None if folder is None else f"{folder}/report.html",
        }
    )


def show_controls(report: Report) -> None:
    """Print the comparison with the controls."""
    from compose.report.svg import number

    rows = []
    for control in report["controls"]:
        test = control["test"] or {}
        rows.append(
            [
                control["label"],
                number(control["shots_loss"]),
                _share(test.get("exact_match")),
                _gap(test.get("minus_composed")) if control["name"] != "composed" else "",
                number((test.get("loss") or {}).get("mean")),
                number(control["cost"]),
            ]
        )
    strong = next((i for i, control in enumerate(report["controls"]) if control["name"] == "composed"), -1)
    headings = [">loss on shots", ">exact match (95 %)", ">minus composed", ">test loss", ">cost"]
    if rows:
        print_table(["control", *headings], rows, strong=strong)


def show_weights(report: Report) -> None:
    """Print the largest weights; a layer-wise result shows each adapter's range over the groups."""
    weights = report["weights"]
    columns = [[row[i] for row in weights["values"]] for i in range(len(weights["adapters"]))]
    named = [(name, column) for name, column in zip(weights["adapters"], columns, strict=True) if any(column)]
    named.sort(key=lambda item: -max(map(abs, item[1])))
    if not named:
        say("No adapter has a weight: the base model is kept as it is.\n")
        return
    rows = [[name, _weight(column)] for name, column in named[:SHOWN_WEIGHTS]]
    layerwise = len(weights["groups"]) > 1
    print_table(
        ["adapter", f">weight (lowest to highest of {len(weights['groups'])} groups)" if layerwise else ">weight"],
        rows,
    )
    if len(named) > SHOWN_WEIGHTS:
        say(f"and {len(named) - SHOWN_WEIGHTS} smaller ones\n")


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print a dry run: simple values as facts, lists of objects as tables, warnings last."""
    simple = {name: value for name, value in plan.items() if not isinstance(value, Mapping | list | tuple)}
    print_facts(
        {_words(name): _amount(name, value) for name, value in simple.items()},
        title="Plan (nothing was searched or written)",
    )
    for name, value in plan.items():
        if isinstance(value, Mapping):
            print_facts(value, title=f"\n{name}")
        elif _is_rows(value):
            columns = list(value[0])
            say("")
            print_table(columns, [[_amount(name, row.get(name, "")) for name in columns] for row in value], title=name)
        elif isinstance(value, list | tuple):
            for item in value:
                say(f"{name.rstrip('s')}: {item}")


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _amount(name: str, value: Any) -> str:
    from compose.report.html import size

    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return size(value) if name.endswith("bytes") else f"{value:,}" if isinstance(value, int) else str(value)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _range(low: float, high: float) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _weight(column: Sequence[float]) -> str:
    if len(column) == 1:
        return f"{column[0]:+.3f}"
    return f"{min(column):+.3f} to {max(column):+.3f}"


def _share(value: Mapping[str, float] | None) -> str:
    from compose.report.svg import percent

    if value is None:
        return NONE
    return f"{percent(value['mean'])} ({percent(value['low'])} to {percent(value['high'])})"


def _gap(value: Mapping[str, float] | None) -> str:
    if value is None:
        return NONE
    if value["low"] == value["high"] == 0:
        return "equal"
    clear = value["low"] > 0 or value["high"] < 0
    return f"{100 * value['mean']:+.0f} points{'' if clear else ', unclear'}"
    return f"{100 * value['mean']:+.0f} points{'' if clear else ', unclear'}"
