"""What a router does, as a PNG picture from a saved trace; Matplotlib draws without a display (extra ``plots``)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compose.errors import BackendUnavailableError
from compose.report.plain import printable
from compose.report.routing_data import Course, Depth, depth_metrics, depths
from compose.routers.trace import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12
MOST_NUMBERED = 16
"""Experts up to which cells carry numbers and lines a legend."""
COLOURS = "Blues"
DPI = 130


def routing_png(trace: RoutingTrace, course: Course | None = None) -> bytes:
    """Return the picture: heat maps per task, task by expert, entropy by depth, and the course of a training.

    Args:
        trace: What was measured.
        course: Of the training; None leaves it out.

    Raises:
        BackendUnavailableError: Matplotlib is not installed.
    """
    figure = _figure_class()(layout="constrained", dpi=DPI)
    floors, tasks = depths(trace), list(trace.seen_tasks())
    panels: list[str | None] = [None, *tasks[:MOST_PANELS]] if len(tasks) != 1 else [tasks[0]]
    below = _drawings(trace, floors, tasks, course or Course())
    cell = 0.22 if len(trace.experts) <= 24 else 0.11
    panel_width = max(1.3, cell * len(trace.experts) + 0.3)
    panel_height = max(1.6, 0.17 * len(floors)) + 0.75
    width = max(9.0, panel_width * len(panels) + 1.0)
    height = panel_height + 0.5 + 3.1 * len(below)
    figure.set_size_inches(min(width, 40.0), min(height, 60.0))
    heights = [panel_height, *[3.1] * len(below)]
    parts = figure.subfigures(1 + len(below), 1, height_ratios=heights, squeeze=False)[:, 0]
    _panels(parts[0], trace, floors, panels)
    for part, drawings in zip(parts[1:], below, strict=True):
        axes = part.subplots(1, len(drawings), squeeze=False)[0]
        for axis, draw in zip(axes, drawings, strict=True):
            draw(axis)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            f"a PNG needs Matplotlib, which cannot be imported here ({error}); install the extra: "
            "pip install 'adapter-compose[plots]'; the HTML report needs nothing"
        ) from error
    return Figure


def _drawings(trace: RoutingTrace, floors: Sequence[Depth], tasks: Sequence[str], course: Course) -> list[list[Any]]:
    """Rows of drawings below the heat maps; each takes its axes."""
    rows: list[list[Any]] = [
        [
            lambda axis: _aggregate(axis, trace, [*tasks, None]),
            lambda axis: _by_depth(axis, trace, floors),
        ]
    ]
    later: list[Any] = []
    if any(len(points) > 1 for points in course.load.values()):
        later.append(lambda axis: _lines(axis, course.load, "load of the experts", legend=True))
    values = {"loss": course.loss, "entropy of the gates, nats": course.entropy}
    for name, points in values.items():
        if len(points) > 1:
            later.append(lambda axis, name=name, points=points: _lines(axis, {name: points}, name))
    return rows + ([later] if later else [])


def _panels(part: Any, trace: RoutingTrace, floors: Sequence[Depth], panels: Sequence[str | None]) -> None:
    """One row of heat maps of layers by experts."""
    found = [[depth_metrics(trace, floor, task) for floor in floors] for task in panels]
    nothing = [float("nan")] * len(trace.experts)
    maps = [[nothing if one is None else list(one.load) for one in column] for column in found]
    largest = max((value for column in maps for row in column for value in row if value == value), default=1.0)
    axes = part.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, task, values in zip(axes, panels, maps, strict=True):
        image = axis.imshow(
            values or [nothing], vmin=0, vmax=largest, cmap=COLOURS, aspect="auto", interpolation="none"
        )
        axis.set_title(_short(task), fontsize=8, fontweight="bold" if task is None else "normal", parse_math=False)
        _expert_ticks(axis, trace)
        every = max(1, -(-len(floors) // 32))
        axis.set_yticks(range(0, len(floors), every), [floor.label for floor in floors][::every], fontsize=7)
        axis.tick_params(length=0)
    axes[0].set_ylabel("layer", fontsize=8)
    bar = part.colorbar(image, ax=list(axes), fraction=0.012, pad=0.01)
    bar.set_label("share of the gates", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _aggregate(axis: Axes, trace: RoutingTrace, tasks: Sequence[str | None]) -> None:
    """Tasks by experts over all sites, with numbers where they can be read."""
    found = [(task, one) for task in tasks if (one := trace.overall(task)) is not None]
    values = [list(one.load) for _, one in found] or [[float("nan")] * len(trace.experts)]
    axis.imshow(values, vmin=0, cmap=COLOURS, aspect="auto")
    axis.set_yticks(range(len(found)), [_short(task) for task, _ in found], fontsize=7, parse_math=False)
    axis.set_title("load by task and expert", fontsize=9)
    _expert_ticks(axis, trace, names=True)
    axis.tick_params(length=0)
    top = max((value for row in values for value in row), default=0.0)
    if len(trace.experts) <= MOST_NUMBERED and len(found) <= 24:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                ink = "white" if value > 0.6 * top else "black"
                axis.text(x, y, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=ink)


def _by_depth(axis: Axes, trace: RoutingTrace, floors: Sequence[Depth]) -> None:
    """Entropies by depth, and active experts where their number varies."""
    found = [(place, floor.label, depth_metrics(trace, floor)) for place, floor in enumerate(floors)]
    drawn = [(place, label, one) for place, label, one in found if one is not None and one.entropy is not None]
    places = [place for place, _, _ in drawn]
    low, high = [one.entropy or 0.0 for _, _, one in drawn], [one.entropy_of_mean or 0.0 for _, _, one in drawn]
    axis.fill_between(places, low, high, alpha=0.15, color="C0", linewidth=0)
    axis.plot(places, high, "o--", color="C7", markersize=3, label="of the mean")
    axis.plot(places, low, "o-", color="C0", markersize=3, label="of a decision")
    axis.axhline(
        max((one.largest_entropy for _, _, one in drawn), default=0.0), color="C7", linewidth=0.8, label="log E"
    )
    axis.set_title("entropy by depth, nats", fontsize=9)
    every = max(1, -(-len(floors) // 16))
    axis.set_xticks(range(0, len(floors), every), [floor.label for floor in floors][::every], fontsize=7)
    axis.set_ylim(bottom=0)
    _plain(axis, "layer")
    handles, labels = axis.get_legend_handles_labels()
    active = [one.active or 0.0 for _, _, one in drawn]
    if active and max(active) - min(active) > 1e-9:
        second = axis.twinx()
        line = second.plot(places, active, "s:", color="C1", markersize=3, label="active experts")
        second.set_ylim(bottom=0)
        second.set_ylabel("active experts", fontsize=8)
        second.tick_params(labelsize=7)
        handles, labels = [*handles, *line], [*labels, "active experts"]
    axis.legend(handles, labels, fontsize=7, frameon=False)


def _lines(
    axis: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], title: str, *, legend: bool = False
) -> None:
    """Values over steps."""
    for name, points in lines.items():
        axis.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, label=_short(name))
    axis.set_title(title, fontsize=9)
    axis.set_ylim(bottom=0)
    _plain(axis, "step")
    if legend and len(lines) <= MOST_NUMBERED:
        made = axis.legend(fontsize=6, frameon=False, ncols=2)
        for text in made.get_texts():
            text.set_parse_math(False)


def _expert_ticks(axis: Axes, trace: RoutingTrace, *, names: bool = False) -> None:
    count = len(trace.experts)
    every = -(-count // 16)
    labels = [str(place + 1) for place in range(count)]
    if names and count <= MOST_NUMBERED:
        labels = [f"{place + 1} {_short(name, 16)}" for place, name in enumerate(trace.experts)]
        axis.set_xticks(range(count), labels, fontsize=7, rotation=35, ha="right", parse_math=False)
        return
    axis.set_xticks(range(0, count, every), labels[::every], fontsize=7)
    axis.set_xlabel("expert", fontsize=8)


def _plain(axis: Axes, below: str) -> None:
    axis.set_xlabel(below, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _short(name: str | None, limit: int = 22) -> str:
    text = "all tasks" if name is None else printable(name).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
