"""What the pictures of a router show, prepared once for the page and for PNG: depths, loads, courses, warnings.

Shape letters: ``E`` experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compose.report.plain import printable
from compose.report.svg import number, percent
from compose.routers.site_metrics import SiteMetrics, mean_metrics
from compose.routers.sites import body_path
from compose.routers.token_strip import StripLine, TokenStrip
from compose.routers.trace import RoutingTrace
from compose.text.jsonl import BadLineError, Line, read_jsonl

MOST_DEPTHS = 48
"""Rows of a heat map; deeper models are shown with layers taken together."""
ALIKE = 0.95
"""Cosine from which two experts are called alike."""
COLLAPSED = 0.95
"""Share of the gates from which one expert has taken a site over."""


class Depth(NamedTuple):
    """Sites that stand at one height: a layer, or some neighbouring ones.

    Attributes:
        label: How the page names it.
        sites: Names of the sites.
    """

    label: str
    sites: tuple[str, ...]


class Course(NamedTuple):
    """Training as ``history.jsonl`` tells it; values are ``(step, value)``.

    Attributes:
        loss: The model's loss.
        entropy: Mean entropy of the gates, in nats.
        load: Expert -> share of the gates.
    """

    loss: tuple[tuple[float, float], ...] = ()
    entropy: tuple[tuple[float, float], ...] = ()
    load: Mapping[str, tuple[tuple[float, float], ...]] = {}


def depths(trace: RoutingTrace) -> list[Depth]:
    """Group a trace's sites by layer, in the order of the forward."""
    groups: dict[tuple[str, int], list[str]] = {}
    for sums in trace.sites:
        groups.setdefault((_body(sums.site, sums.layer), sums.layer), []).append(sums.site)
    bodies = {body for body, _ in groups}
    several = len(bodies) > 1
    named = [(printable(_label(*place, several=several)), tuple(sites)) for place, sites in groups.items()]
    size = math.ceil(len(named) / MOST_DEPTHS) if named else 1
    taken = [named[start : start + size] for start in range(0, len(named), size)]
    return [Depth(part[0][0], tuple(site for _, sites in part for site in sites)) for part in taken]


def depth_metrics(trace: RoutingTrace, depth: Depth, task: str | None = None) -> SiteMetrics | None:
    """Means over the sites of a depth; None where nothing was counted."""
    found = [trace.metrics(site, task) for site in depth.sites]
    return mean_metrics([one for one in found if one is not None and one.decisions])


def gradient_norm(trace: RoutingTrace, depth: Depth) -> float | None:
    """Mean gradient norm of the depth's gates; None where it was not measured."""
    norms = [trace.gradients[site].mean for site in depth.sites if site in trace.gradients]
    return sum(norms) / len(norms) if norms else None


def strip_lines(strip: TokenStrip, trace: RoutingTrace) -> list[tuple[str, list[int]]]:
    """Depth -> the dominant expert of every token, by the sum of shares over the depth's sites."""
    by_site = {line.site: line for line in strip.lines}
    known = {sums.site for sums in trace.sites}
    loose = [Depth(line.site, (line.site,)) for line in strip.lines if line.site not in known]
    rows = []
    for depth in [*depths(trace), *loose]:
        lines = [by_site[site] for site in depth.sites if site in by_site]
        if lines:
            rows.append((depth.label, _majority(strip, lines)))
    return rows


def read_history(path: Path, experts: Sequence[str]) -> Course:
    """Read the course of a training from ``history.jsonl``.

    Lines with ``step`` count; of them ``loss``, ``entropy``, and ``load`` (numbers in the experts' order, or by name).

    Raises:
        ExamplesError: No such file, or lines that are no object or whose load is not one number per expert.
    """

    def read(record: Mapping[str, Any], line: Line) -> Mapping[str, Any]:
        load = record.get("load")
        if isinstance(load, list) and load and len(load) != len(experts):
            raise BadLineError(f"load has {len(load)} numbers, there are {len(experts)} experts")
        return record

    lines = read_jsonl([path], read, fields="'step' and 'loss'")
    return course_of([line for line in lines if _is_number(line.get("step"))], experts)


def course_of(lines: Sequence[Mapping[str, Any]], experts: Sequence[str]) -> Course:
    """The course that lines of ``history.jsonl`` tell; what is no finite number is left out."""
    load: dict[str, list[tuple[float, float]]] = {expert: [] for expert in experts}
    for line in lines:
        given = line.get("load") or {}
        named = given if isinstance(given, Mapping) else dict(zip(experts, given, strict=True))
        for expert in experts:
            load[expert] += _points([line], named.get(expert))
    return Course(
        tuple(point for line in lines for point in _points([line], line.get("loss"))),
        tuple(point for line in lines for point in _points([line], line.get("entropy"))),
        {expert: tuple(points) for expert, points in load.items() if points},
    )


def warnings_of(trace: RoutingTrace, scores: Mapping[str, float] | None = None) -> list[str]:
    """What a reader must not miss.

    Args:
        trace: The measurements.
        scores: Macro scores by contender, higher is better; the routed model's is called ``router``.
    """
    return [*_beaten(scores or {}), *_balance(trace), *_meaning(trace), *_alike(trace)]


def _beaten(scores: Mapping[str, float]) -> list[str]:
    """Contenders that are as good without this router."""
    own = scores.get("router")
    if own is None:
        return []
    return [
        f"the router ({number(own)}) does not beat {name} ({number(score)})"
        for name, score in scores.items()
        if name not in ("router", "oracle") and not name.startswith("oracle ") and score >= own
    ]


def _balance(trace: RoutingTrace) -> list[str]:
    each = [trace.metrics(sums.site) for sums in trace.sites]
    measured = [one for one in each if one is not None and one.decisions]
    if not measured:
        return ["nothing was counted: no decision of this trace is in its sums"]
    overall = mean_metrics(measured)
    found = []
    if overall is not None and overall.dead:
        names = ", ".join(trace.experts[index] for index in overall.dead)
        found.append(f"dead at every site (below 1 % of the even share of the gates): {names}")
    some = sum(1 for one in measured if one.dead)
    if some and some < len(measured):
        found.append(f"{some} of {len(measured)} sites have dead experts")
    full = sum(1 for one in measured if max(one.load, default=0.0) > COLLAPSED and one.largest_entropy > 0)
    if full:
        found.append(f"at {full} of {len(measured)} sites a single expert has over {percent(COLLAPSED)} of the gates")
    return found


def _meaning(trace: RoutingTrace) -> list[str]:
    overall = trace.overall()
    if overall is None or overall.largest_entropy == 0:
        return []
    found = []
    if overall.entropy is not None and overall.entropy > 0.99 * overall.largest_entropy:
        found.append("the gates are as good as uniform: this router acts like the plain average of the experts")
    elif overall.information is not None and overall.information < 0.01 * overall.largest_entropy:
        found.append("the gates hardly depend on the input: fixed weights would do the same")
    if overall.task_information is not None and overall.task_information < 0.01:
        found.append("the experts say nothing about the task: I(task; expert) is below 1 % of H(task)")
    if overall.gate_sum is not None and overall.gate_sum < 0.5:
        found.append(
            f"the gates add up to {number(overall.gate_sum)} on average: selection without renormalisation weakens "
            "the experts"
        )
    return found


def _alike(trace: RoutingTrace) -> list[str]:
    pairs = []
    for i, row in enumerate(trace.cosines or ()):
        for j in range(i):
            cosine = row[j]
            if cosine is not None and cosine > ALIKE:
                pairs.append(f"{trace.experts[j]} and {trace.experts[i]} ({number(cosine)})")
    if not pairs:
        return []
    more = f" and {len(pairs) - 5} more pairs" if len(pairs) > 5 else ""
    return [f"experts that are nearly the same, by the cosine of their deltas: {', '.join(pairs[:5])}{more}"]


def _body(site: str, layer: int) -> str:
    path = site.rpartition(":")[0] if ":" in site else site
    return path if layer < 0 else body_path(path)


def _label(body: str, layer: int, *, several: bool) -> str:
    names = [name for name in body.split(".") if name]
    stack = next((name for name in names if name in ("encoder", "decoder")), names[-1] if names else "")
    if layer < 0:
        return stack if several and stack else "model"
    return f"{stack} {layer}" if several and stack else str(layer)


def _majority(strip: TokenStrip, lines: Sequence[StripLine]) -> list[int]:
    part = TokenStrip(name="", tokens=strip.tokens, prompt_length=strip.prompt_length, lines=tuple(lines))
    return part.majority()


def _points(lines: Sequence[Mapping[str, Any]], value: Any) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(value)) for line in lines if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
