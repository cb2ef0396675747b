"""SiteMetrics: what the sums of a site say: how sure, how balanced, how specialised its routing is.

Shape letters: ``E`` experts, ``L`` lines (decisions of unknown tasks, then one per task).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from compose.routers.entropy import shannon
from compose.routers.site_sums import SiteSums

DEAD = 0.01
"""An expert is dead below this part of the even share of the gates."""


@dataclass(frozen=True, kw_only=True)
class SiteMetrics:
    """Measures of one site, for one task or for all; entropies in nats.

    Probabilities are those before selection, as shares of their absolute sum; gates are those applied. None stands
    where there is nothing to measure.

    Attributes:
        decisions: How many were counted.
        entropy: ``E[H(p)]``: how undecided a single decision is.
        entropy_of_mean: ``H(E[p])``: how evenly the experts are used in all.
        information: Their difference: what an input tells about the expert.
        largest_entropy: ``log E`` of the experts that take part.
        utilisation: ``f_e``: share of the (decision, slot) assignments.
        importance: ``P_e``: mean probability.
        load: Mean share of the applied gates.
        dominant: Share of the decisions in which the expert has the largest gate.
        max_load: Largest load over the mean load; 1 is balance.
        load_cv2: Squared coefficient of variation of the load.
        utilisation_cv2: The same of ``f_e``.
        importance_cv2: The same of ``P_e``.
        dead: Experts whose load is below 1 % of the even share.
        active: Mean number of experts with a gate that is not 0.
        kept: Mean probability of the selected experts before renormalisation.
        gate_sum: Mean sum of the gates.
        accuracy: Share of labelled decisions whose dominant expert is the labelled one.
        label_share: Mean share of the gates that the labelled expert gets.
        switch_rate: Share of neighbouring tokens of a response with different dominant experts.
        task_information: ``I(task; expert) / H(task)``, over decisions of known tasks; of all tasks together only.
    """

    decisions: float
    entropy: float | None
    entropy_of_mean: float | None
    information: float | None
    largest_entropy: float
    utilisation: tuple[float, ...]
    importance: tuple[float, ...]
    load: tuple[float, ...]
    dominant: tuple[float, ...]
    max_load: float | None
    load_cv2: float | None
    utilisation_cv2: float | None
    importance_cv2: float | None
    dead: tuple[int, ...]
    active: float | None
    kept: float | None
    gate_sum: float | None
    accuracy: float | None
    label_share: float | None
    switch_rate: float | None
    task_information: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)


def metrics_of(sums: SiteSums, line: int | None = None) -> SiteMetrics:
    """Return the measures of a site.

    Args:
        sums: Its sums.
        line: 0 for unknown tasks, 1 + task number; None: all together.
    """
    lines = slice(None) if line is None else slice(line, line + 1)
    total = {name: float(sums.scalar(name)[lines].sum()) for name in ("decisions", "entropy", "active", "kept")}
    total |= {name: float(sums.scalar(name)[lines].sum()) for name in ("gate_sum", "labelled", "correct")}
    total |= {name: float(sums.scalar(name)[lines].sum()) for name in ("label_share", "pairs", "switches")}
    importance, load, chosen, dominant = (
        _shares(sums.vector(name)[lines].sum(0)) for name in ("importance", "load", "chosen", "dominant")
    )
    here = sums.available_E
    entropy = _over(total["entropy"], float(sums.vector("importance")[lines].sum()))
    of_mean = float(shannon(importance)) if float(importance.sum()) > 0 else None
    even = 1.0 / max(1, int(here.sum()))
    dead = here & (load < DEAD * even) if float(load.sum()) > 0 else torch.zeros_like(here)
    return SiteMetrics(
        decisions=total["decisions"],
        entropy=entropy,
        entropy_of_mean=of_mean,
        information=None if entropy is None or of_mean is None else max(0.0, of_mean - entropy),
        largest_entropy=math.log(max(1, int(here.sum()))),
        utilisation=tuple(chosen.tolist()),
        importance=tuple(importance.tolist()),
        load=tuple(load.tolist()),
        dominant=tuple(dominant.tolist()),
        max_load=_max_over_mean(load[here]),
        load_cv2=cv2(load[here]),
        utilisation_cv2=cv2(chosen[here]),
        importance_cv2=cv2(importance[here]),
        dead=tuple(dead.nonzero().squeeze(-1).tolist()),
        active=_over(total["active"], total["decisions"]),
        kept=_over(total["kept"], total["decisions"]),
        gate_sum=_over(total["gate_sum"], total["decisions"]),
        accuracy=_over(total["correct"], total["labelled"]),
        label_share=_over(total["label_share"], total["labelled"]),
        switch_rate=_over(total["switches"], total["pairs"]),
        task_information=task_information(sums.vector("load")[1:]) if line is None else None,
    )


def mean_metrics(each: Sequence[SiteMetrics]) -> SiteMetrics | None:
    """Means over sites, every site counting the same; dead are experts that are dead at all of them. None of none."""
    if not each:
        return None
    means: dict[str, Any] = {}
    for field in fields(SiteMetrics):
        values = [getattr(one, field.name) for one in each]
        if field.name == "dead":
            means["dead"] = tuple(sorted(set.intersection(*map(set, values))))
        elif isinstance(values[0], tuple):
            means[field.name] = tuple(sum(column) / len(values) for column in zip(*values, strict=True))
        else:
            known = [value for value in values if value is not None]
            means[field.name] = sum(known) / len(known) if known else None
    return SiteMetrics(**means)


def cv2(shares_E: torch.Tensor) -> float | None:
    """Population variance over squared mean; None where the mean is 0."""
    mean = float(shares_E.mean()) if len(shares_E) else 0.0
    return float(shares_E.var(correction=0)) / mean**2 if mean > 0 else None


def task_information(joint_LE: torch.Tensor) -> float | None:
    """``I(task; expert) / H(task)`` of joint weights, one line per task; None with fewer than two tasks."""
    joint_LE = joint_LE[joint_LE.sum(-1) > 0]
    if len(joint_LE) < 2:
        return None
    joint_LE = joint_LE / joint_LE.sum()
    of_task, of_expert = float(shannon(joint_LE.sum(1))), float(shannon(joint_LE.sum(0)))
    return max(0.0, of_task + of_expert - float(shannon(joint_LE.flatten()))) / of_task


def _shares(values_E: torch.Tensor) -> torch.Tensor:
    total = values_E.sum()
    return values_E / total if float(total) > 0 else torch.zeros_like(values_E)


def _over(total: float, count: float) -> float | None:
    return total / count if count > 0 else None


def _max_over_mean(load_E: torch.Tensor) -> float | None:
    mean = float(load_E.mean()) if len(load_E) else 0.0
    return float(load_E.max()) / mean if mean > 0 else None
