"""Audit of a composed delta ``sum_i w_i s_i B_i A_i``: adapters that collude pass one by one and show in the sum.

The statistics of single adapters are taken of the sum, through its joined factors, and two more per target: the
*gain* ``|sum|^2 / sum_i |w_i delta_i|^2`` (1 where the members are orthogonal, up to their number where they push the
same way) and the *ratio* ``|sum| / max_i |w_i delta_i|``. They are compared with compositions of siblings: every
member is replaced by one drawn from its own group, under the same coefficients. The draws share members, so they are
fewer independent cases than their number. Only compositions of outputs are meant; mixing parameters has cross terms.

Letters: ``N`` members, ``M`` targets, ``F`` features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from compose.adapter import Adapter, LowRank
from compose.errors import IncompatibleError
from compose.hub_index.audit.reference import (
    FEATURES,
    FEWEST,
    Feature,
    Group,
    Member,
    Outlier,
    Reference,
    feature_table,
)
from compose.hub_index.audit.statistics import ModuleStatistics, factor_statistics
from compose.merging.deltas import Deltas

DRAWS = 64
"""Compositions of siblings that a composition is compared with."""

_FEATURES = (*FEATURES, Feature("gain", 0.02), Feature("ratio", 0.02))
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class ComposedStatistics:
    """Statistics of the sum in one target.

    Attributes:
        whole: Of the sum, as of a single adapter.
        largest: ``max_i |w_i delta_i|``.
        gain: ``|sum|^2 / sum_i |w_i delta_i|^2``, 0 where all members are 0.
    """

    whole: ModuleStatistics
    largest: float
    gain: float

    @property
    def ratio(self) -> float:
        """``|sum| / max_i |w_i delta_i|``, 0 where all members are 0."""
        return self.whole.fro / self.largest if self.largest > 0 else 0.0


class LayerNorms(NamedTuple):
    """Norms of one layer over its targets.

    Attributes:
        layer: Its number, ``""`` for targets outside the layers.
        norm: Of the sum.
        largest: Of the largest member.
        member: Its name.
    """

    layer: str
    norm: float
    largest: float
    member: str

    @property
    def ratio(self) -> float | None:
        """``norm / largest``, None where every member is 0."""
        return self.norm / self.largest if self.largest > 0 else None


@dataclass(frozen=True, eq=False)
class Composition:
    """A composed delta, described.

    Attributes:
        coefficients: Name -> ``w``; zeros left out.
        statistics: Target -> statistics of the sum.
        layers: Norms per layer, in natural order.
        draws: Compositions of siblings it was compared with; 0: no reference.
        outliers: Its summaries among them, largest score first.
        p: Share of the draws, itself counted in, with a score as high; None without a reference.
    """

    coefficients: Mapping[str, float]
    statistics: Mapping[str, ComposedStatistics]
    layers: tuple[LayerNorms, ...]
    draws: int = 0
    outliers: tuple[Outlier, ...] = ()
    p: float | None = None


def compose_statistics(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, ComposedStatistics]:
    """Return the statistics of ``sum_i weights[i] * delta_i`` in every target, without a dense delta.

    Raises:
        IncompatibleError: Shapes differ, or a factor or a weight is not finite.
    """
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.targets)
    found = {}
    for module in modules:
        have = [
            (one.targets[module], float(w)) for one, w in zip(adapters, weights, strict=True) if module in one.targets
        ]
        found[module] = _of_target(module, [update for update, _ in have], [weight for _, weight in have])
    return found


def _of_target(module: str, updates: list[LowRank], weights: list[float]) -> ComposedStatistics:
    deltas = Deltas.of(updates, weights, target=module, dtype=torch.float64)
    norms = [abs(weight) * update.norm() for update, weight in zip(updates, weights, strict=True)]
    whole = factor_statistics(module, deltas.combine(weights))
    apart = sum(norm**2 for norm in norms)
    return ComposedStatistics(whole, max(norms), whole.fro**2 / apart if apart > 0 else 0.0)


def describe_composition(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    reference: Reference,
    draws: int = DRAWS,
    seed: int = 0,
) -> Composition:
    """Describe a composition and compare it with compositions of siblings.

    Args:
        adapters: Members.
        weights: Their coefficients.
        reference: Where siblings come from; the members themselves never stand for siblings.
        draws: How many compositions of siblings.
        seed: Of the draws.

    Raises:
        IncompatibleError: Nothing to compose, shapes that differ, values or weights that are not finite.
    """
    if len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise IncompatibleError(f"a composition needs one finite weight per adapter, got {list(weights)!r:.200}")
    chosen = [(one, float(weight)) for one, weight in zip(adapters, weights, strict=True) if weight != 0]
    if not chosen:
        raise IncompatibleError("every weight of the composition is 0; there is nothing to audit")
    members, used = [one for one, _ in chosen], [weight for _, weight in chosen]
    statistics = compose_statistics(members, used)
    table = ReferenceDraws(members, used, reference, draws=draws, seed=seed)
    outliers = table.compare(statistics)
    names = {one.name: weight for one, weight in chosen}
    p = table.p_value(outliers[0].score) if outliers else None
    return Composition(names, statistics, _layers(members, used, statistics), len(table), tuple(outliers), p)


class ReferenceDraws:
    """Compositions of siblings under given coefficients: what a composition of such members looks like.

    Args:
        members: Adapters whose groups the siblings come from.
        weights: Coefficients.
        reference: Where siblings come from.
        draws: How many compositions.
        seed: Of the draws.
    """

    def __init__(
        self,
        members: Sequence[Adapter],
        weights: Sequence[float],
        reference: Reference,
        *,
        draws: int = DRAWS,
        seed: int = 0,
    ) -> None:
        self._modules = sorted({module for one in members for module in one.targets})
        self._group: Group | None = None
        own = [Member.of(one) for one in members]
        taken = {one.identity for one in own}
        pools = [[one for one in reference.siblings(member) if one.identity not in taken] for member in own]
        readable = [[one for one in pool if one.load is not None] for pool in pools]
        if any(len(pool) < FEWEST for pool in readable):
            return
        generator = np.random.default_rng(seed)
        tables = []
        for _ in range(draws):
            drawn: list[Member] = []
            for pool in readable:
                left = [one for one in pool if all(one is not other for other in drawn)]
                drawn.append(left[int(generator.integers(len(left)))])
            found = compose_statistics([one.load() for one in drawn if one.load is not None], weights)
            tables.append(_table(found, self._modules))
        self._group = Group(self._modules, _FEATURES, np.stack(tables))

    def __len__(self) -> int:
        return 0 if self._group is None else len(self._group)

    def compare(self, statistics: Mapping[str, ComposedStatistics]) -> list[Outlier]:
        """Return the summaries of a composition among the draws, largest score first; empty without a reference."""
        return [] if self._group is None else self._group.compare(_table(statistics, self._modules))

    def p_value(self, score: float) -> float | None:
        """Return the share of the draws, itself counted in, with a score as high; None without a reference."""
        return None if self._group is None else self._group.p_value(score)


def _table(statistics: Mapping[str, ComposedStatistics], modules: Sequence[str]) -> np.ndarray:
    """Return the features of the targets, ``(M, F)``."""
    single = feature_table({module: one.whole for module, one in statistics.items()}, modules)
    more = [[math.log(max(one, 1e-12)) for one in (statistics[m].gain, statistics[m].ratio)] for m in modules]
    return np.concatenate([single, np.array(more)], axis=1)


def _layers(
    adapters: Sequence[Adapter], weights: Sequence[float], statistics: Mapping[str, ComposedStatistics]
) -> tuple[LayerNorms, ...]:
    layers: dict[str, list[str]] = {}
    for module in statistics:
        number = _LAYER.search(module)
        layers.setdefault(number[1] if number else "", []).append(module)
    found = []
    for layer, modules in layers.items():
        sizes = {
            one.name: abs(weight) * math.sqrt(sum(one.targets[m].norm() ** 2 for m in modules if m in one.targets))
            for one, weight in zip(adapters, weights, strict=True)
        }
        largest = max(sizes, key=sizes.__getitem__)
        norm = math.sqrt(sum(statistics[m].whole.fro ** 2 for m in modules))
        found.append(LayerNorms(layer, norm, sizes[largest], largest))
    return tuple(sorted(found, key=lambda one: (one.layer == "", int(one.layer or 0))))
