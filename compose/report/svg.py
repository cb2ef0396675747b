"""Small inline SVG charts, built so that text keeps its size at every page width.

Horizontal positions are percentages of the element's width and vertical ones are pixels, so a chart stretches with its
column while labels, dots and strokes do not. A chart with named rows is one small drawing per row: the names stand in
HTML beside it, where they wrap and where autoescape applies. Colours are CSS classes, so a page's light and dark
schemes both apply. Every text that enters goes through ``Markup.format``, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compose.report.plain import NONE

ROW_HEIGHT = 26
MINUS = "\N{MINUS SIGN}"
ROW = Markup('<svg class="row" width="100%" height="{}" aria-hidden="true">{}</svg>')
_GRID = Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="-4" y2="{}"/>')
_TEXT = Markup('<text class="tick" x="{:.2f}%" y="{}" text-anchor="middle">{}</text>')


@dataclass(frozen=True)
class Scale:
    """A linear axis from ``low`` to ``high`` (``low < high``), drawn from 0 % to 100 %."""

    low: float
    high: float

    @classmethod
    def covering(cls, values: Sequence[float], *, include: Sequence[float] = ()) -> Scale:
        """Return an axis over the finite ``values`` and ``include``, widened to round tick positions."""
        finite = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        if high - low < 1e-9 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        for _ in range(2):  # a widened range may have a larger step
            step = _step(low, high)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high)

    def at(self, value: float) -> float:
        """Return the position of ``value`` in percent, held inside the axis; NaN stands at the high end."""
        if math.isnan(value):
            return 100.0
        return 100.0 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return three to seven round values from ``low`` to ``high``."""
        step = _step(self.low, self.high)
        first = math.ceil(self.low / step - 1e-9)
        return [(first + i) * step for i in range(math.floor(self.high / step + 1e-9) - first + 1)]


def number(value: float | None) -> str:
    """Write a number with three significant digits, without an exponent where that is readable.

    Example:
        >>> number(0.12345), number(0.5), number(1234.6), number(2.0), number(-0.0)
        ('0.123', '0.500', '1,235', '2', '0')
    """
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}".replace("-", MINUS)
    if size < 0.0005:
        return f"{value:.1e}".replace("-", MINUS)
    digits = 0 if value == round(value) else min(3, 2 - math.floor(math.log10(size)))
    return f"{value:.{digits}f}".replace("-", MINUS)


def tick_label(value: float) -> str:
    """Write a tick with as few digits as it needs ("0.5")."""
    return ("0" if abs(value) < 1e-12 else f"{value:,.6g}").replace("-", MINUS)


def percent(value: float | None) -> str:
    """Write a share in [0, 1] as a percentage without decimals ("68 %")."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.0f} %".replace("-", MINUS)


def axis_row(scale: Scale, write: Callable[[float], str] = tick_label) -> Markup:
    """Return the tick labels that stand below the rows of a chart."""
    labels = (_TEXT.format(scale.at(tick), 14, write(tick)) for tick in scale.ticks())
    return ROW.format(20, Markup("").join(labels))


def interval_row(scale: Scale, value: float, low: float | None, high: float | None, *, strong: bool) -> Markup:
    """Return one dot with its interval, for a dot plot; ``strong`` marks the row the page is about."""
    middle, series = ROW_HEIGHT // 2, "main" if strong else "other"
    parts = [gridlines(scale, ROW_HEIGHT)]
    if low is not None and high is not None:
        line = Markup('<line class="whisker {}" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>')
        parts.append(line.format(series, scale.at(low), scale.at(high), middle, middle))
    parts.append(_dot(scale.at(value), middle, 5.5 if strong else 4.5, series))
    return ROW.format(ROW_HEIGHT, Markup("").join(parts))


def bar_row(scale: Scale, value: float) -> Markup:
    """Return one bar from zero, for signed weights."""
    zero, end = scale.at(0.0), scale.at(value)
    bar = Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="5" height="{}" rx="2"/>').format(
        "negative" if value < 0 else "positive", min(zero, end), abs(end - zero), ROW_HEIGHT - 10
    )
    return ROW.format(ROW_HEIGHT, gridlines(scale, ROW_HEIGHT) + bar)


def dumbbell_row(scale: Scale, before: float, after: float) -> Markup:
    """Return two joined dots: hollow for before, filled for after; the colour says whether the loss fell."""
    middle, series = ROW_HEIGHT // 2, "worse" if after > before else "better"
    line = Markup('<line class="link {}" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>').format(
        series, scale.at(before), scale.at(after), middle, middle
    )
    dots = _dot(scale.at(before), middle, 4.5, "hollow") + _dot(scale.at(after), middle, 5, series)
    return ROW.format(ROW_HEIGHT, gridlines(scale, ROW_HEIGHT) + line + dots)


def heat_row(values: Sequence[float | None], largest: float, *, show_values: bool) -> Markup:
    """Return one row of cells on a diverging scale: the sign picks the hue, the size its strength over ``largest``.

    Where there is no value there is no cell.
    """
    width = 100.0 / max(1, len(values))
    parts = []
    for position, value in enumerate(values):
        if value is None:
            continue
        strength = min(1.0, abs(value) / largest) if largest > 0 else 0.0
        hue = "negative" if value < 0 else "positive"
        cell = Markup('<rect class="cell {}" x="{:.3f}%" width="{:.3f}%" y="0" height="{}" fill-opacity="{:.2f}"/>')
        parts.append(cell.format(hue, position * width, width, ROW_HEIGHT - 2, strength))
        if show_values:
            text = Markup('<text class="{}" x="{:.3f}%" y="{}" text-anchor="middle">{}</text>')
            ink = "on-strong" if strength > 0.72 else "on-weak"
            parts.append(text.format(ink, (position + 0.5) * width, ROW_HEIGHT // 2 + 3, short(value)))
    return ROW.format(ROW_HEIGHT, Markup("").join(parts))


def heat_header(labels: Sequence[str]) -> Markup:
    """Return the column labels of a heat map; labels with a common first word ("layer 3") lose it."""
    words = [label.rsplit(" ", 1)[-1] if len(labels) > 1 else label for label in labels]
    width = 100.0 / max(1, len(labels))
    every = math.ceil(len(labels) / 40)
    texts = (_TEXT.format((i + 0.5) * width, 14, word) for i, word in enumerate(words) if i % every == 0)
    return ROW.format(20, Markup("").join(texts))


def short(value: float) -> str:
    """Write a weight in at most five characters (".42", "-1.3"), for the cells of a heat map."""
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
    text = text.replace("0.", ".", 1) if abs(value) < 0.995 else text
    return "0" if float(text or 0) == 0 else text.replace("-", MINUS)


def convergence(history: Sequence[Sequence[float]], *, height: int = 240, limit: int = 400) -> Markup:
    """Return the search's course: every evaluated value as a dot and the best so far as a stepped line.

    Values far above the rest (by more than the span of the lower 90 %) are drawn at the upper edge, so that one bad
    candidate does not flatten the line.

    Args:
        history: ``(cost, value, best)`` per evaluation, cost rising.
        height: Of the plot, in pixels.
        limit: Most points drawn; longer histories are thinned evenly, keeping the first and the last.
    """
    points = _thin([point for point in history if all(math.isfinite(part) for part in point)], limit)
    if not points:
        return Markup("")
    horizontal = Scale.covering([point[0] for point in points], include=[0.0])
    vertical = Scale.covering([min(point[1], _ceiling(points)) for point in points] + [point[2] for point in points])
    dots = (
        Markup('<circle class="value" cx="{:.2f}%" cy="{:.1f}" r="2.5"/>').format(
            horizontal.at(cost), _height_at(vertical, value, height)
        )
        for cost, value, best in points
        if value != best
    )
    body = _plot_grid(horizontal, vertical, height) + Markup("").join(dots) + _stepped(points, horizontal, vertical)
    label = f"Best value {number(points[-1][2])} after {number(points[-1][0])} forward-equivalents"
    frame = Markup('<svg class="plot" width="100%" height="{}" role="img" aria-label="{}">{}</svg>')
    return frame.format(height + 24, label, body.replace("HEIGHT", str(height)))


def line_plot(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], label: str, *, height: int = 200) -> Markup:
    """Return lines over one horizontal axis, from zero or the smallest value up.

    Args:
        series: CSS class and points ``(x, y)`` of every line, x rising; points that are not finite are left out.
        label: What a screen reader says of it.
        height: Of the plot, in pixels.

    Returns:
        The drawing; nothing where no line has a point.
    """
    drawn = [(name, _thin([one for one in points if all(map(math.isfinite, one))], 400)) for name, points in series]
    drawn = [(name, points) for name, points in drawn if points]
    if not drawn:
        return Markup("")
    horizontal = Scale.covering([x for _, points in drawn for x, _ in points], include=[0.0])
    vertical = Scale.covering([y for _, points in drawn for _, y in points], include=[0.0])
    path = Markup('<path class="line {}" d="{}" vector-effect="non-scaling-stroke"/>')
    lines = []
    for name, points in drawn:
        places = [f"{horizontal.at(x):.2f} {100 - vertical.at(y):.2f}" for x, y in points]
        lines.append(path.format(name, "M" + "L".join(places if len(places) > 1 else [places[0], places[0]])))
    frame = Markup('<svg width="100%" height="{}" viewBox="0 0 100 100" preserveAspectRatio="none">{}</svg>')
    body = _plot_grid(horizontal, vertical, height) + frame.format(height, Markup("").join(lines))
    outer = Markup('<svg class="plot" width="100%" height="{}" role="img" aria-label="{}">{}</svg>')
    return outer.format(height + 24, label, body)


def _stepped(points: Sequence[Sequence[float]], horizontal: Scale, vertical: Scale) -> Markup:
    x, y = horizontal.at(points[0][0]), 100 - vertical.at(points[0][2])
    steps = [f"M{x:.2f} {y:.2f}"]
    for cost, _, best in points[1:]:
        steps.append(f"H{horizontal.at(cost):.2f}V{100 - vertical.at(best):.2f}")
    path = Markup('<path class="best" d="{}" vector-effect="non-scaling-stroke"/>').format("".join(steps))
    frame = Markup('<svg width="100%" height="HEIGHT" viewBox="0 0 100 100" preserveAspectRatio="none">{}</svg>')
    return frame.format(path)


def _plot_grid(horizontal: Scale, vertical: Scale, height: int) -> Markup:
    parts = []
    for tick in vertical.ticks():
        y = _height_at(vertical, tick, height)
        line = '<line class="grid" x1="0" x2="100%" y1="{:.1f}" y2="{:.1f}"/>'
        text = '<text class="tick" x="-8" y="{:.1f}" text-anchor="end">{}</text>'
        parts += [Markup(line).format(y, y), Markup(text).format(y + 4, tick_label(tick))]
    parts += [_TEXT.format(horizontal.at(tick), height + 18, tick_label(tick)) for tick in horizontal.ticks()]
    return Markup("").join(parts)


def gridlines(scale: Scale, height: int) -> Markup:
    """Return the vertical lines behind one row of a chart; the one at zero is stronger."""
    lines = (
        _GRID.format("zero" if abs(tick) < 1e-12 else "grid", scale.at(tick), scale.at(tick), height + 4)
        for tick in scale.ticks()
    )
    return Markup("").join(lines)


def _dot(x: float, y: float, radius: float, series: str) -> Markup:
    return Markup('<circle class="dot {}" cx="{:.2f}%" cy="{}" r="{}"/>').format(series, x, y, radius)


def _height_at(vertical: Scale, value: float, height: int) -> float:
    return height * (1 - vertical.at(value) / 100)


def _ceiling(points: Sequence[Sequence[float]]) -> float:
    values = sorted(point[1] for point in points)
    ninth = values[int(0.9 * (len(values) - 1))]
    return ninth + (ninth - values[0])


def _thin(points: Sequence[Sequence[float]], limit: int) -> list[Sequence[float]]:
    if len(points) <= limit:
        return list(points)
    return [points[round(i * (len(points) - 1) / (limit - 1))] for i in range(limit)]


def _step(low: float, high: float) -> float:
    """Return 1, 2 or 5 times a power of ten that cuts ``[low, high]`` into about five parts."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
