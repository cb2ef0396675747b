"""What a router does, as one self-contained HTML page from a saved trace; wording and layout: ``routing.html``.

``render_routing`` takes a `RoutingTrace`, and where there are any the course of its training and the scores of what it
was compared with. Names and texts come from strangers: see `compose.report.html` for how text is made safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from compose.report import svg, svg_routing
from compose.report.html import clean, environment
from compose.report.plain import printable
from compose.report.routing_data import (
    Course,
    Depth,
    depth_metrics,
    depths,
    gradient_norm,
    strip_lines,
    warnings_of,
)
from compose.routers.site_metrics import SiteMetrics
from compose.routers.token_strip import TokenStrip
from compose.routers.trace import RoutingTrace

MOST_PANELS = 16
MOST_EXPERTS = 48
MOST_STRIPS = 8
MOST_TOKENS = 400
MOST_COLUMNS = 80
COLOURS = 12
"""Experts that have a colour of their own in texts and lines; the others share one."""

COLUMNS = (
    ("entropy", "Entropy"),
    ("share", "of log E"),
    ("entropy_of_mean", "H(mean)"),
    ("information", "MI"),
    ("active", "Active"),
    ("kept", "Kept"),
    ("gate_sum", "Sum"),
    ("max_load", "Max load"),
    ("load_cv2", "CV²"),
    ("dead", "Dead"),
    ("accuracy", "Accuracy"),
    ("switch_rate", "Switches"),
    ("task_information", "I(task)"),
    ("gradient", "Gradient"),
)
WHOLE = ("kept", "gate_sum")
"""Columns that say something only where they are not 1 throughout."""


def render_routing(
    trace: RoutingTrace, course: Course | None = None, scores: Mapping[str, float] | None = None
) -> str:
    """Return the page.

    Args:
        trace: What was measured.
        course: Of the training; None leaves its section out.
        scores: Macro scores by contender, the routed model's as ``router``; a router that does not beat one is
            reported as such. None leaves them out.

    Returns:
        UTF-8 HTML: of more than 48 experts those with the largest load are drawn, of many tasks and texts the first,
        and the page says so.
    """
    floors = depths(trace)
    shown = _shown(trace)
    tasks = list(trace.seen_tasks())
    return (
        environment()
        .get_template("routing.html")
        .render(
            about=clean(dict(trace.about)),
            title=f"Routing of {printable(str(trace.about.get('preset') or 'a mixture'))}",
            experts=[printable(name) for name in trace.experts],
            counted=trace.over,
            sites=len(trace.sites),
            warnings=[printable(text) for text in warnings_of(trace, scores)],
            tiles=trace.overall(),
            maps=_maps(trace, floors, tasks, shown),
            aggregate=_aggregate(trace, tasks, shown),
            entropy=_entropy(trace, floors),
            active=_active(trace, floors),
            course=_course(trace, course or Course()),
            strips=[_strip(strip, trace) for strip in trace.strips[:MOST_STRIPS]],
            strips_left_out=max(0, len(trace.strips) - MOST_STRIPS),
            by_task=_table([(_task(name), trace.overall(name), None) for name in [None, *tasks]]),
            by_depth=_table(
                [(floor.label, depth_metrics(trace, floor), gradient_norm(trace, floor)) for floor in floors]
            ),
            by_expert=_experts(trace),
            scores=_scores(scores or {}),
            switching=_switching(trace),
        )
    )


def colours(trace: RoutingTrace) -> list[str]:
    """CSS class per expert: ``e0`` ... for those that dominate most tokens of the texts, then by load; else ``ex``."""
    if len(trace.experts) <= COLOURS:
        return [f"e{index}" for index in range(len(trace.experts))]
    seen = Counter(expert for strip in trace.strips[:MOST_STRIPS] for expert in strip.majority())
    weight = _weight(trace)
    order = sorted(range(len(trace.experts)), key=lambda expert: (-seen[expert], -weight[expert]))
    places = {expert: place for place, expert in enumerate(order[:COLOURS])}
    return [f"e{places[expert]}" if expert in places else "ex" for expert in range(len(trace.experts))]


def _weight(trace: RoutingTrace) -> list[float]:
    """How much there is to see of every expert."""
    overall = trace.overall()
    return list(overall.load) if overall is not None else [0.0] * len(trace.experts)


def _shown(trace: RoutingTrace) -> list[int]:
    """The experts that are drawn, in the bank's order."""
    weight = _weight(trace)
    return sorted(sorted(range(len(trace.experts)), key=lambda expert: -weight[expert])[:MOST_EXPERTS])


def _maps(trace: RoutingTrace, floors: Sequence[Depth], tasks: Sequence[str], shown: Sequence[int]) -> dict[str, Any]:
    """One heat map of layers by experts per task, all at one scale."""
    names: list[str | None] = [None, *tasks[:MOST_PANELS]] if len(tasks) != 1 else [tasks[0]]
    found = {name: [depth_metrics(trace, floor, name) for floor in floors] for name in names}
    rows = {
        name: [None if one is None else [one.load[expert] for expert in shown] for one in column]
        for name, column in found.items()
    }
    largest = max((value for column in rows.values() for row in column for value in row or ()), default=0.0)
    columns = [str(expert + 1) for expert in shown]
    panels = [
        {
            "name": _task(name),
            "svg": svg_routing.heat_panel(column, largest, columns, f"Load by layer and expert: {_task(name)}"),
            "width": svg_routing.cell_width(len(columns)) * len(columns),
        }
        for name, column in rows.items()
    ]
    return {
        "panels": panels,
        "labels": svg_routing.row_labels([floor.label for floor in floors]),
        "largest": largest,
        "left_out": max(0, len(tasks) - MOST_PANELS),
        "experts_left_out": len(trace.experts) - len(shown),
        "together": max((len(floor.sites) for floor in floors), default=0),
    }


def _aggregate(trace: RoutingTrace, tasks: Sequence[str], shown: Sequence[int]) -> dict[str, Any]:
    """Tasks by experts, over all sites."""
    found = [(name, trace.overall(name)) for name in [*tasks, None]]
    rows = [(name, [one.load[expert] for expert in shown]) for name, one in found if one is not None]
    largest = max((value for _, row in rows for value in row), default=0.0)
    readable = len(shown) <= 16
    drawn = [
        {
            "label": _task(name),
            "svg": svg.heat_row(row, largest, show_values=readable),
            "value": "",
            "main": name is None,
        }
        for name, row in rows
    ]
    axis = svg.heat_header([str(expert + 1) for expert in shown])
    return {"rows": drawn, "axis": axis, "columns": len(shown), "readable": readable, "largest": largest}


def _named(label: str) -> str:
    return f"layer {label}" if label.isdigit() else label


def _task(name: str | None) -> str:
    return "all tasks" if name is None else printable(name)


def _entropy(trace: RoutingTrace, floors: Sequence[Depth]) -> dict[str, Any]:
    """Mean entropy and entropy of the mean, by depth."""
    found = [(floor.label, depth_metrics(trace, floor)) for floor in floors]
    drawn = [(label, one) for label, one in found if one is not None and one.entropy is not None]
    top = max((one.largest_entropy for _, one in drawn), default=1.0)
    scale = svg.Scale.covering([top], include=[0.0])
    rows = [
        {
            "label": _named(label),
            "svg": svg_routing.range_row(scale, one.entropy or 0.0, one.entropy_of_mean or 0.0),
            "value": f"{svg.number(one.entropy)} · {svg.number(one.entropy_of_mean)}",
            "main": False,
        }
        for label, one in drawn
    ]
    return {"rows": rows, "axis": svg.axis_row(scale), "top": top}


def _active(trace: RoutingTrace, floors: Sequence[Depth]) -> dict[str, Any]:
    """Mean active experts by depth, where selection lets their number vary; no rows where it does not."""
    found = [(floor.label, depth_metrics(trace, floor)) for floor in floors]
    values = [(label, one.active) for label, one in found if one is not None and one.active is not None]
    steady = all(_is_whole(trace, sums.site) for sums in trace.sites) and len({value for _, value in values}) <= 1
    scale = svg.Scale.covering([value for _, value in values], include=[0.0])
    rows = [
        {"label": _named(label), "svg": svg.bar_row(scale, value), "value": svg.number(value), "main": False}
        for label, value in ([] if steady else values)
    ]
    return {"rows": rows, "axis": svg.axis_row(scale)}


def _is_whole(trace: RoutingTrace, site: str) -> bool:
    """Whether every decision of a site has as many active experts."""
    found = trace.metrics(site)
    return found is None or found.active is None or abs(found.active - round(found.active)) < 1e-9


def _course(trace: RoutingTrace, course: Course) -> dict[str, Any]:
    """Loss, entropy and load over the steps of a training."""
    marks = colours(trace)
    order = [expert for expert in sorted(range(len(trace.experts)), key=lambda e: marks[e]) if marks[expert] != "ex"]
    drawn = [expert for expert in sorted(order) if trace.experts[expert] in course.load]
    lines = [(marks[expert], course.load[trace.experts[expert]]) for expert in drawn]
    return {
        "loss": svg.line_plot([("main", course.loss)], "Loss over steps") if len(course.loss) > 1 else "",
        "entropy": svg.line_plot([("main", course.entropy)], "Entropy over steps") if len(course.entropy) > 1 else "",
        "load": svg.line_plot(lines, "Load of the experts over steps") if any(len(p) > 1 for _, p in lines) else "",
        "legend": _legend(trace, drawn),
        "left_out": len(course.load) - len(drawn),
    }


def _legend(trace: RoutingTrace, experts: Sequence[int]) -> list[dict[str, str]]:
    """Colour and name of the given experts; those that share a colour stand together at the end."""
    marks = colours(trace)
    own = [{"mark": marks[e], "name": f"{e + 1} {printable(trace.experts[e])}"} for e in experts if marks[e] != "ex"]
    others = sum(1 for expert in experts if marks[expert] == "ex")
    return [*own, {"mark": "ex", "name": f"{others} others"}] if others else own


def _strip(strip: TokenStrip, trace: RoutingTrace) -> dict[str, Any]:
    """A text whose tokens carry the colour of their expert, and the same layer by layer."""
    marks = [*colours(trace), "en"]
    majority = strip.majority()[:MOST_TOKENS]
    names = [printable(name) for name in trace.experts]
    tokens = [
        {
            "text": printable(token).replace("\n", "⏎\n") or "·",
            "mark": marks[expert],
            "title": names[expert] if expert >= 0 else "none",
            "response": place >= strip.prompt_length,
        }
        for place, (token, expert) in enumerate(zip(strip.tokens, majority, strict=False))
    ]
    columns = min(len(strip.tokens), MOST_COLUMNS)
    rows = [
        {"label": label, "cells": [(marks[expert], expert + 1 or "") for expert in experts[:columns]]}
        for label, experts in strip_lines(strip, trace)
    ]
    return {
        "name": printable(strip.name),
        "task": printable(strip.task),
        "tokens": tokens,
        "heads": [printable(token).replace("\n", "⏎") for token in strip.tokens[:columns]],
        "rows": rows,
        "legend": _legend(trace, sorted({expert for expert in majority if expert >= 0})),
        "left_out": len(strip.tokens) - len(tokens),
        "columns_left_out": len(strip.tokens) - columns,
    }


def _table(found: Sequence[tuple[str, SiteMetrics | None, float | None]]) -> dict[str, Any]:
    """Rows of measures, without the columns in which nothing was measured."""
    rows = [{"name": printable(name), **_cells(one, norm)} for name, one, norm in found if one is not None]
    heads = [{"key": key, "name": name} for key, name in COLUMNS if _says_something(key, [row[key] for row in rows])]
    written = [
        {"name": row["name"], "decisions": row["decisions"], "cells": [svg.number(row[head["key"]]) for head in heads]}
        for row in rows
    ]
    return {"heads": heads, "rows": written}


def _says_something(key: str, column: Sequence[float | None]) -> bool:
    known = [value for value in column if value is not None]
    return bool(known) and not (key in WHOLE and all(abs(value - 1) < 1e-6 for value in known))


def _cells(one: SiteMetrics, norm: float | None) -> dict[str, Any]:
    share = one.entropy / one.largest_entropy if one.entropy is not None and one.largest_entropy else None
    plain = {key: getattr(one, key, None) for key, _ in COLUMNS}
    return {**plain, "share": share, "dead": float(len(one.dead)), "gradient": norm, "decisions": one.decisions}


def _experts(trace: RoutingTrace) -> list[dict[str, Any]]:
    """One row per expert: how much it is used, and which other it resembles most."""
    overall = trace.overall()
    rows = []
    for expert in _shown(trace):
        closest = _closest(trace, expert)
        rows.append(
            {
                "number": expert + 1,
                "name": printable(trace.experts[expert]),
                "load": overall.load[expert] if overall else None,
                "utilisation": overall.utilisation[expert] if overall else None,
                "importance": overall.importance[expert] if overall else None,
                "dominant": overall.dominant[expert] if overall else None,
                "dead": bool(overall) and expert in (overall.dead if overall else ()),
                "closest": None if closest is None else printable(trace.experts[closest[0]]),
                "cosine": None if closest is None else closest[1],
            }
        )
    return rows


def _closest(trace: RoutingTrace, expert: int) -> tuple[int, float] | None:
    row = trace.cosines[expert] if trace.cosines is not None else ()
    known = [(other, value) for other, value in enumerate(row) if other != expert and value is not None]
    return max(known, key=lambda pair: pair[1], default=None)


def _scores(scores: Mapping[str, float]) -> dict[str, Any]:
    """Bars of the contenders, best first."""
    scale = svg.Scale.covering(list(scores.values()), include=[0.0])
    rows = [
        {
            "label": printable(name),
            "svg": svg.bar_row(scale, value),
            "value": svg.number(value),
            "main": name == "router",
        }
        for name, value in sorted(scores.items(), key=lambda item: -item[1])
    ]
    return {"rows": rows, "axis": svg.axis_row(scale)}


def _switching(trace: RoutingTrace) -> float | None:
    """Switches per pair of tokens, over all sites that were followed."""
    pairs = sum(float(sums.scalar("pairs").sum()) for sums in trace.sites)
    return sum(float(sums.scalar("switches").sum()) for sums in trace.sites) / pairs if pairs else None
