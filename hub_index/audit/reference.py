"""Groups of siblings and robust z-scores: an adapter is unusual only among adapters of its own kind.

No absolute threshold means anything: norms of real adapters differ 6,000-fold, and "one direction holds 90 % of the
energy" is true of most benign ones (spec/ecosystem.md 3.3). So an adapter is compared with those of the same base
model, targets and ranks, by two steps:

1. every (target, statistic) gets a robust z-score, ``(x - median) / (1.4826 MAD)`` over the siblings;
2. per statistic two summaries over the targets, the *shift* (median z: the whole adapter is off) and the *peak*
   (log of the largest ``|z|``: one target is off), get a robust z-score among the siblings' own summaries, each taken
   with itself left out. A hundred targets give a large peak by chance; the siblings' peaks say how large.

The largest of these is the adapter's score. Siblings have scores too, and the share of those that are as high is a
p-value without assumptions on distributions (conformal: if the adapter were one of them, its rank would be uniform).

Letters: ``N`` siblings, ``M`` targets, ``F`` statistics, ``S = 2 F`` summaries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from compose.adapter import Adapter
from compose.hub_index.audit.statistics import adapter_statistics

FEWEST = 20
"""With fewer siblings there is no reference."""
MOST = 256
"""More siblings than this add nothing; the first by hash are taken."""
LIMIT = 4.0
"""Robust standard deviations beyond which a summary is a finding."""
RARE = 0.05
"""p-value of the score up to which it is a remark; with `FEWEST` siblings it can be reached, with fewer it cannot."""


class Statistic(Protocol):
    """What is compared of one target: `ModuleStatistics`, or a `StatRecord` of an index."""

    @property
    def sigma1(self) -> float: ...  # noqa: D102
    @property
    def fro(self) -> float: ...  # noqa: D102
    @property
    def energy1(self) -> float: ...  # noqa: D102
    @property
    def spec_entropy(self) -> float: ...  # noqa: D102
    @property
    def kurtosis(self) -> float: ...  # noqa: D102


class Feature(NamedTuple):
    """One compared number of a target.

    Attributes:
        name: For findings.
        floor: Smallest spread: a group of near-copies does not make a difference below it unusual.
    """

    name: str
    floor: float


FEATURES = (
    Feature("sigma1", 0.05),
    Feature("fro", 0.05),
    Feature("energy1", 0.01),
    Feature("spec_entropy", 0.02),
    Feature("kurtosis", 0.02),
)
"""``sigma1``, ``fro`` and ``kurtosis`` are compared as logarithms, so their floors are relative."""

_SHIFT_FLOOR = 0.5
_PEAK_FLOOR = 0.25


class GroupKey(NamedTuple):
    """What siblings share.

    Attributes:
        base: Identifier of the base model.
        targets: Hash of all (target, width, rank).
    """

    base: str
    targets: str


def group_key(base: str, targets: Iterable[tuple[str, int, int, int]]) -> GroupKey:
    """Return the key of a base's identifier and ``(target, O, I, R)`` of all targets, in any order."""
    text = "\n".join(sorted(f"{name} {out} {wide} {rank}" for name, out, wide, rank in targets))
    return GroupKey(base, hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest())


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter that others can be compared with.

    Attributes:
        name: For people.
        key: Of its group.
        statistics: Target -> its statistics.
        sha256: Of its weight file; members of one hash count once.
        load: Reads the adapter whole; None where there is nothing to read.
    """

    name: str
    key: GroupKey
    statistics: Mapping[str, Statistic]
    sha256: str = ""
    load: Callable[[], Adapter] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, adapter: Adapter, statistics: Mapping[str, Statistic] | None = None) -> Member:
        """Make a member of an adapter in memory."""
        key = group_key(
            adapter.base,
            [(name, one.out_features, one.in_features, one.rank) for name, one in adapter.targets.items()],
        )
        found = adapter_statistics(adapter) if statistics is None else statistics
        return cls(adapter.name, key, found, adapter.sha256, lambda: adapter)

    @cached_property
    def identity(self) -> str:
        """The hash of the file, or where there is none a hash of the statistics."""
        if self.sha256:
            return self.sha256
        text = repr(sorted((module, one.sigma1, one.fro, one.kurtosis) for module, one in self.statistics.items()))
        return "values " + hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


class Outlier(NamedTuple):
    """One summary of one adapter among its siblings.

    Attributes:
        feature: Name of the statistic.
        kind: ``"shift"`` (the median target) or ``"peak"`` (one target).
        score: Robust z-score of the summary; of a shift its magnitude.
        z: The z-score behind it: of the median target with its sign, or of the target that is farthest off.
        module: That target; ``""`` for a shift.
    """

    feature: str
    kind: str
    score: float
    z: float
    module: str


class Group:
    """Siblings, as a table of features.

    Args:
        modules: ``M`` targets.
        features: ``F`` compared numbers.
        table: ``(N, M, F)``.
    """

    def __init__(self, modules: Sequence[str], features: Sequence[Feature], table: np.ndarray) -> None:
        self.modules = tuple(modules)
        self.features = tuple(features)
        self.table = table
        self._floors = np.array([one.floor for one in features])

    def __len__(self) -> int:
        return len(self.table)

    def compare(self, values: np.ndarray) -> list[Outlier]:
        """Return the summaries of an adapter outside the group, ``values (M, F)``, largest score first."""
        return self._outliers(self._z(values, self.table), self._summaries)

    def compare_member(self, number: int) -> list[Outlier]:
        """Return the summaries of a member among the others, largest score first."""
        return self._outliers(self._left_out[number], np.delete(self._summaries, number, axis=0))

    def p_value(self, score: float, number: int | None = None) -> float:
        """Return the share of members, the one compared counted in, whose scores are at least ``score``.

        Args:
            score: Of an adapter outside the group, or of a member.
            number: Of that member.
        """
        others = self._scores if number is None else np.delete(self._scores, number)
        return float(1 + (others >= score).sum()) / (1 + len(others))

    @cached_property
    def _scores(self) -> np.ndarray:
        """The largest score of every member among the others: ``(N,)``."""
        return np.array([self.compare_member(number)[0].score for number in range(len(self.table))])

    def _z(self, values: np.ndarray, others: np.ndarray) -> np.ndarray:
        centre = np.median(others, axis=0)
        spread = 1.4826 * np.median(np.abs(others - centre), axis=0)
        return (values - centre) / np.maximum(spread, self._floors)

    @cached_property
    def _left_out(self) -> np.ndarray:
        """z-scores of every member among the others: ``(N, M, F)``."""
        return np.stack([self._z(own, np.delete(self.table, at, axis=0)) for at, own in enumerate(self.table)])

    @cached_property
    def _summaries(self) -> np.ndarray:
        """Summaries of every member, itself left out: ``(N, 2, F)``."""
        return np.stack([_summary(z) for z in self._left_out])

    def _outliers(self, z: np.ndarray, others: np.ndarray) -> list[Outlier]:
        own = _summary(z)
        centre = np.median(others, axis=0)
        spread = 1.4826 * np.median(np.abs(others - centre), axis=0)
        floors = np.array([[_SHIFT_FLOOR], [_PEAK_FLOOR]])
        scores = (own - centre) / np.maximum(spread, floors)
        found = []
        for at, feature in enumerate(self.features):
            farthest = int(np.abs(z[:, at]).argmax())
            found += [
                Outlier(feature.name, "shift", abs(float(scores[0, at])), float(own[0, at]), ""),
                Outlier(feature.name, "peak", float(scores[1, at]), float(z[farthest, at]), self.modules[farthest]),
            ]
        return sorted(found, key=lambda one: -one.score)


def _summary(z: np.ndarray) -> np.ndarray:
    """Return shift and peak of ``z (M, F)``: ``(2, F)``."""
    return np.stack([np.median(z, axis=0), np.log(np.maximum(np.abs(z).max(axis=0), 1e-3))])


def feature_table(statistics: Mapping[str, Statistic], modules: Sequence[str]) -> np.ndarray:
    """Return the features of the targets, ``(M, F)``, logarithms where `FEATURES` says so."""
    rows = [
        (
            np.log(max(one.sigma1, 1e-30)),
            np.log(max(one.fro, 1e-30)),
            one.energy1,
            one.spec_entropy,
            np.log(max(one.kurtosis, 1e-3)),
        )
        for one in (statistics[module] for module in modules)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(FEATURES))


class Reference:
    """Adapters that others are compared with, sorted into groups.

    Args:
        members: In any order. Of several with one hash the first counts.
    """

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self.members: list[Member] = []
        self._groups: dict[GroupKey, list[Member]] = {}
        self._tables: dict[GroupKey, Group] = {}
        seen: set[str] = set()
        for member in members:
            self.members.append(member)
            if member.identity not in seen:
                seen.add(member.identity)
                self._groups.setdefault(member.key, []).append(member)

    @classmethod
    def of(cls, adapters: Iterable[Adapter]) -> Reference:
        """Make a reference of adapters in memory, or of a bank's (``bank[name] for name in bank``)."""
        return cls(Member.of(adapter) for adapter in adapters)

    def __len__(self) -> int:
        return len(self.members)

    def siblings(self, member: Member) -> list[Member]:
        """Return the other members of its group, at most `MOST`."""
        others = [one for one in self._groups.get(member.key, ()) if one.identity != member.identity]
        return sorted(others, key=lambda one: one.identity)[:MOST]

    def compare(self, member: Member) -> list[Outlier]:
        """Return the summaries of an adapter among its siblings, largest score first; none below `FEWEST` siblings."""
        group, number = self._group_of(member)
        if group is None:
            return []
        if number is not None:
            return group.compare_member(number)
        return group.compare(feature_table(member.statistics, group.modules))

    def p_value(self, member: Member) -> float | None:
        """Return the share of adapters of its kind, itself counted in, with a score as high; None without a reference.

        An ordinary adapter has one of at most `RARE` in about 1 of 20 cases.
        """
        group, number = self._group_of(member)
        return None if group is None else group.p_value(self.compare(member)[0].score, number)

    def _group_of(self, member: Member) -> tuple[Group | None, int | None]:
        """Return the group of an adapter and its number there; no group below `FEWEST` siblings."""
        if len(self.siblings(member)) < FEWEST:
            return None, None
        chosen = sorted(self._groups[member.key], key=lambda one: one.identity)[: MOST + 1]
        if member.key not in self._tables:
            modules = sorted(member.statistics)
            table = np.stack([feature_table(one.statistics, modules) for one in chosen])
            self._tables[member.key] = Group(modules, FEATURES, table)
        inside = [at for at, one in enumerate(chosen) if one.identity == member.identity]
        return self._tables[member.key], inside[0] if inside else None
