"""Copies and near-copies: adapters of one hash, and adapters whose deltas point the same way.

The inner product of two deltas needs no ``(O, I)`` matrix and does not depend on how either is split into factors:

    <B A, B' A'> = tr(A^T B^T B' A') = sum over (R, R') of (B^T B') * (A A'^T).

Which pairs are worth it: target by target ``<D, D'> <= |D| |D'|`` (Cauchy-Schwarz), so the cosine of two adapters is
at most the cosine of the vectors of their targets' norms, which statistics already hold. Factors are read only of
pairs that pass this. Letters: ``N`` adapters, ``M`` targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from compose.adapter import Adapter, LowRank
from compose.errors import ComposeError
from compose.hub_index.audit.reference import Member

NEAR = 0.99
"""Cosine of two adapters' deltas above which they are near-copies."""
_BLOCK = 512
_KEPT = 16


class Pair(NamedTuple):
    """Two adapters that are one.

    Attributes:
        first: Name.
        second: Name.
        cosine: Of their deltas over all targets; 1 for equal files.
        exact: Whether their files have one hash.
    """

    first: str
    second: str
    cosine: float
    exact: bool


def inner_product(one: LowRank, other: LowRank) -> float:
    """Return ``<delta, delta'>`` (Frobenius) in float64, through two ``(R, R')`` matrices."""
    left = one.b.detach().double().T @ other.b.detach().double()
    right = one.a.detach().double() @ other.a.detach().double().T
    return one.scaling * other.scaling * float((left * right).sum())


def delta_cosine(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """Return the cosine of two adapters' deltas over all targets, 0 where one of them is 0.

    A target that one of them misses, or has in another shape, counts as 0 there.
    """
    common = [path for path in one if path in other and _fit(one[path], other[path])]
    product = sum(inner_product(one[path], other[path]) for path in common)
    sizes = [math.sqrt(sum(update.norm() ** 2 for update in side.values())) for side in (one, other)]
    return product / (sizes[0] * sizes[1]) if sizes[0] > 0 and sizes[1] > 0 else 0.0


class Copies(NamedTuple):
    """What a search for copies found.

    Attributes:
        pairs: In the order of the members.
        unread: Adapters that may be near-copies and could not be read, name -> reason.
    """

    pairs: tuple[Pair, ...]
    unread: Mapping[str, str]


def find_copies(members: Sequence[Member], *, near: float = NEAR) -> Copies:
    """Return the copies and near-copies among adapters.

    Args:
        members: All of them; factors are read only of pairs that can be near-copies.
        near: Cosine above which two are near-copies.
    """
    return _search(members, members, near, skip_earlier=True)


def copies_of(member: Member, others: Sequence[Member], *, near: float = NEAR) -> Copies:
    """Return the pairs of one adapter with its copies and near-copies among ``others``."""
    return _search([member], others, near, skip_earlier=False)


def candidates(members: Sequence[Member], others: Sequence[Member], near: float = NEAR) -> Iterator[tuple[int, int]]:
    """Yield the pairs (number in ``members``, number in ``others``) whose norms allow a cosine of ``near``; exact."""
    column: dict[str, int] = {}
    for member in (*members, *others):
        for module in member.statistics:
            column.setdefault(module, len(column))
    right = _directions(others, column)
    for low in range(0, len(members), _BLOCK):
        left = _directions(members[low : low + _BLOCK], column)
        rows, columns = np.nonzero(left @ right.T >= near - 1e-9)
        yield from zip((rows + low).tolist(), columns.tolist(), strict=True)


def _search(members: Sequence[Member], others: Sequence[Member], near: float, *, skip_earlier: bool) -> Copies:
    pairs: list[Pair] = []
    reader = _Reader()
    same: dict[str, list[int]] = {}
    for at, other in enumerate(others):
        if other.sha256:
            same.setdefault(other.sha256, []).append(at)
    exact = {(at, twin) for at, one in enumerate(members) for twin in same.get(one.sha256, ())}
    for at, twin in sorted(exact | set(candidates(members, others, near))):
        one, other = members[at], others[twin]
        if one is other or (skip_earlier and twin <= at):
            continue
        if (at, twin) in exact:
            pairs.append(Pair(one.name, other.name, 1.0, exact=True))
        elif one.key.base == other.key.base and (first := reader(one)) and (second := reader(other)):
            cosine = delta_cosine(first.targets, second.targets)
            if cosine > near:
                pairs.append(Pair(one.name, other.name, cosine, exact=False))
    return Copies(tuple(pairs), reader.unread)


def _directions(members: Sequence[Member], column: Mapping[str, int]) -> np.ndarray:
    """Return the norms of the targets of every adapter as a vector of length 1, ``(N, M)``; 0 for adapters of 0."""
    table = np.zeros((len(members), len(column)))
    for row, member in zip(table, members, strict=True):
        for module, one in member.statistics.items():
            row[column[module]] = one.fro
    sizes = np.linalg.norm(table, axis=1, keepdims=True)
    return np.divide(table, sizes, out=np.zeros_like(table), where=sizes > 0)


class _Reader:
    """Reads adapters, keeps the last few, and remembers which could not be read."""

    def __init__(self) -> None:
        self.unread: dict[str, str] = {}
        self._kept: dict[int, Adapter | None] = {}

    def __call__(self, member: Member) -> Adapter | None:
        if id(member) not in self._kept:
            if len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[id(member)] = self._read(member)
        return self._kept[id(member)]

    def _read(self, member: Member) -> Adapter | None:
        try:
            if member.load is not None:
                return member.load()
            self.unread[member.name] = "there is nothing to read"
        except ComposeError as error:
            self.unread[member.name] = str(error)
        return None


def _fit(one: LowRank, other: LowRank) -> bool:
    return (one.kind, one.b.shape[0], one.a.shape[1]) == (other.kind, other.b.shape[0], other.a.shape[1])
