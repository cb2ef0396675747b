"""A page that leads to several reports: one row per task, for ``compose demo``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compose.report import svg
from compose.report.html import CHOICES, environment
from compose.report.plain import printable

MEASURES = {"base": "base", "best_single": "best single", "trained_lora": "LoRA on the shots", "composed": "composed"}


def render_index(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        rows: Per task ``task``, ``group``, ``description``, ``shots``, ``test``, ``exact_match`` (name -> mean, low,
            high), ``choice``, ``reason``, ``reading``, ``cost``, ``seconds`` and ``report`` (a relative link).
    """
    cards = [{**row, "choice": CHOICES.get(row["choice"], row["choice"]), "plot": _plot(row)} for row in rows]
    return environment().get_template("index.html").render(rows=cards)


def _plot(row: Mapping[str, Any]) -> dict[str, Any]:
    scale = svg.Scale(0.0, 1.0)
    drawn = []
    for name, label in MEASURES.items():
        if name in row["exact_match"]:
            value, main = row["exact_match"][name], name == "composed"
            drawing = svg.interval_row(scale, value["mean"], value["low"], value["high"], strong=main)
            drawn.append(
                {"label": printable(label), "value": svg.percent(value["mean"]), "main": main, "svg": drawing}
            )
    return {"rows": drawn, "axis": svg.axis_row(scale, svg.percent)}
