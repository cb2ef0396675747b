"""Drawings of routers: heat maps of fixed cells, and ranges; see `compose.report.svg` for how they are built."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from compose.report import svg
from compose.report.svg import Scale

CELL_HEIGHT = 15
LEVELS = 24
"""Strengths of colour a cell can have."""

_TEXT = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')


def heat_panel(rows: Sequence[Sequence[float] | None], largest: float, columns: Sequence[str], label: str) -> Markup:
    """Return a heat map of cells of fixed size, first row at the top, numbers of the columns below.

    Args:
        rows: One list of values >= 0 per row, as many as columns; None draws nothing.
        largest: The value of full colour.
        columns: Their labels.
        label: What a screen reader says of it.
    """
    cell, height = cell_width(len(columns)), CELL_HEIGHT * len(rows)
    places: dict[int, list[str]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row or ()):
            level = round(LEVELS * min(1.0, value / largest)) if largest > 0 else 0
            places.setdefault(level, []).append(
                f"M{x * cell} {y * CELL_HEIGHT}h{cell - 1}v{CELL_HEIGHT - 1}h{1 - cell}z"
            )
    back = Markup('<path class="none" d="{}"/>').format("".join(places.pop(0, [])))
    paths = [
        Markup('<path class="positive" fill-opacity="{:.2f}" d="{}"/>').format(
            max(0.06, level / LEVELS), "".join(cells)
        )
        for level, cells in sorted(places.items())
    ]
    every = -(-18 // cell)
    names = (
        _TEXT.format(x * cell + (cell - 1) / 2, height + 13, "middle", name)
        for x, name in enumerate(columns)
        if x % every == 0
    )
    body = back + Markup("").join(paths) + Markup("").join(names)
    frame = Markup('<svg class="panel" width="{}" height="{}" role="img" aria-label="{}">{}</svg>')
    return frame.format(cell * len(columns), height + 18, label, body)


def cell_width(columns: int) -> int:
    """Pixels of a cell: narrower where there are many."""
    return 18 if columns <= 12 else 14 if columns <= 24 else 9


def row_labels(labels: Sequence[str]) -> Markup:
    """Return the labels that stand before the rows of `heat_panel`."""
    width = 10 + 7 * max((len(label) for label in labels), default=0)
    texts = (_TEXT.format(width - 6, place * CELL_HEIGHT + 11, "end", label) for place, label in enumerate(labels))
    frame = Markup('<svg class="panel" width="{}" height="{}" aria-hidden="true">{}</svg>')
    return frame.format(width, CELL_HEIGHT * len(labels) + 18, Markup("").join(texts))


def range_row(scale: Scale, low: float, high: float) -> Markup:
    """Return a filled dot at ``low`` joined to a hollow one at ``high``."""
    middle = svg.ROW_HEIGHT // 2
    line = Markup('<line class="whisker main" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>')
    dot = Markup('<circle class="dot {}" cx="{:.2f}%" cy="{}" r="{}"/>')
    parts = [
        svg.gridlines(scale, svg.ROW_HEIGHT),
        line.format(scale.at(low), scale.at(high), middle, middle),
        dot.format("hollow", scale.at(high), middle, 4.5),
        dot.format("main", scale.at(low), middle, 5),
    ]
    return svg.ROW.format(svg.ROW_HEIGHT, Markup("").join(parts))
