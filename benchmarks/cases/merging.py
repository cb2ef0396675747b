"""Merging rank-16 adapters over the 84 linear layers of a 110M Llama, method by method."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from registry import Check, Measured, Point, Settings, case
from timing import Timing, seconds

import compose
from cases import _merge_references as references
from cases._merge_bank import WIDTHS_110M, memory_of_merge, merge_all, random_adapters
from compose.adapter import Adapter, LowRank
from compose.merging.method import METHODS

LAYERS = 12
Dense = Callable[[list[torch.Tensor]], torch.Tensor]
"""A peer's function of one target's dense deltas."""


class Row(NamedTuple):
    """A method with options, its limit in CPU seconds for 8 adapters and all 84 targets, the gate's reference, peers.

    ``expected`` is the same function on dense deltas, with the options ``gated`` added; ``many`` asks for a second
    point with 20 adapters.
    """

    method: str
    options: dict[str, Any]
    limit_s: float
    expected: Dense
    peft: Dense | None = None
    mergekit: Dense | None = None
    many: bool = False
    gated: Mapping[str, Any] = MappingProxyType({})


def peft_rule(name: str, density: float, dense: list[torch.Tensor]) -> torch.Tensor:
    """A function of PEFT's ``merge_utils``, all weights 1."""
    from peft.utils import merge_utils

    return getattr(merge_utils, name)(dense, dense[0].new_ones(len(dense)), density)


def _mergekit(name: str, density: float, dense: list[torch.Tensor]) -> torch.Tensor:
    """A function of mergekit with the options that make it PEFT's, all weights 1."""
    from mergekit.merge_methods import merge_tensors

    parameters = {"weight": 1.0, "density": density, "normalize": name != "dare_linear", "rescale": False}
    merged = merge_tensors([torch.zeros_like(dense[0]), *dense], name, base_index=0, parameters=parameters)
    return merged if name == "ties" else merged / density


def _sum(dense: list[torch.Tensor]) -> torch.Tensor:
    return sum(dense[1:], dense[0])


def peft_svd(dense: list[torch.Tensor], full_matrices: bool = False) -> torch.Tensor:
    """What PEFT's ``svd`` does with the dense sum; its default ``full_matrices=True`` costs more."""
    u, s, v = torch.linalg.svd(_sum(dense), full_matrices=full_matrices)
    return (u[:, :16] * s[:16]) @ v[:16]


_TIES = partial(peft_rule, "ties", 0.2)
_DARE = partial(peft_rule, "dare_linear", 0.5)
_DARE_TIES = partial(peft_rule, "dare_ties", 0.5)
ELECTED = partial(peft_rule, "dare_ties", 1.0)
ALL = MappingProxyType({"density": 1.0})
"""Random masks cannot be compared, what is done with the entries they leave can."""

ROWS = (
    Row("sum", {}, 0.08, _sum, many=True),
    Row("sum", {"rank": 16}, 0.98, peft_svd, peft_svd, many=True),
    Row("ties", {"density": 0.2, "semantics": "peft"}, 15.0, _TIES, _TIES, partial(_mergekit, "ties", 0.2), True),
    Row("dare", {"density": 0.5}, 11.4, _sum, _DARE, partial(_mergekit, "dare_linear", 0.5), True, ALL),
    Row("dare_ties", {"density": 0.5}, 10.0, ELECTED, _DARE_TIES, partial(_mergekit, "dare_ties", 0.5), True, ALL),
    Row("iso", {}, 1.10, references.iso),
    Row("core_ties", {}, 1.67, references.core_ties),
    Row("tsvm", {}, 2.67, references.tsvm, many=True),
    Row("knots_ties", {}, 4.96, references.knots_ties, many=True),
    Row("ctm", {}, 7.16, references.ctm, gated=MappingProxyType({"tolerance": 0.0, "sweeps": 6})),
)


@case(
    "merging",
    description="8 and 20 rank-16 adapters over 84 targets of a 110M Llama merged by each method, CPU seconds; memory",
    baseline="PEFT's merge_utils, its svd, and mergekit's merge_tensors where it is installed, on dense deltas of one "
    "layer's seven targets, times twelve",
    targets="the figures of the first prototype per method; TIES <= 15 s, DARE-TIES <= 10 s; <= 0.5 GB; svd >= 100x",
)
def merging(settings: Settings) -> Iterator[Point]:
    """Yield one point per method and number of adapters, and per method its memory.

    ``quick`` merges one small layer, and reads the memory of one method that keeps factors and of one that streams.
    """
    layers, shrink = (1, 16) if settings.quick else (LAYERS, 1)
    for count in (8, 20):
        adapters = random_adapters(count, WIDTHS_110M, layers, rank=max(2, 16 // shrink), shrink=shrink)
        for row in ROWS:
            if count == 8 or row.many:
                yield _point(row, adapters, layers, settings)
    yield _svd_point(settings)
    methods = dict.fromkeys(row.method for row in ROWS)
    for method in ("sum", "ties") if settings.quick else methods:
        yield _memory_point(method, settings)


def _point(row: Row, adapters: list[Adapter], layers: int, settings: Settings) -> Point:
    label = f"{row.method}{' to rank 16' if 'rank' in row.options else ''}, {len(adapters)} adapters"
    first = list(adapters[0].targets)[: len(WIDTHS_110M)]

    def dense_of(function: Dense, given: list[Adapter]) -> list[torch.Tensor]:
        return [function([adapter.targets[target].delta() for adapter in given]) for target in first]

    def gate() -> None:
        """In float64, where no entry sits at a threshold by rounding."""
        given = small_adapters(len(adapters)) if row.peft is None else adapters
        double = [doubled(adapter, first) for adapter in given]
        merged = compose.merge(double, row.method, **{**row.options, **row.gated})
        for target, expected in zip(first, dense_of(row.expected, double), strict=True):
            torch.testing.assert_close(merged.targets[target].delta.dense(), expected, rtol=1e-7, atol=1e-7)

    def measure() -> Measured:
        rounds = settings.rounds or (1 if settings.quick else 3)
        mine = Timing(
            tuple(seconds(lambda: merge_all(adapters, row.method, **row.options), "cpu") for _ in range(rounds))
        )
        limit = None if settings.quick or len(adapters) != 8 else row.limit_s
        checks = [Check("CPU seconds, all targets", mine.best, "<=" if limit else "", limit, "s")]
        if row.mergekit is not None and importlib.util.find_spec("mergekit") is not None:
            kit = seconds(lambda: dense_of(row.mergekit, adapters), "cpu") * layers
            checks.append(Check("speed-up against mergekit (measured once)", kit / mine.best, unit="x"))
        if row.peft is None:
            return Measured(checks, mine)
        theirs = Timing(tuple(seconds(lambda: dense_of(row.peft, adapters), "cpu") * layers for _ in range(rounds)))
        return Measured([*checks, Check("speed-up against PEFT", theirs.best / mine.best, unit="x")], mine, theirs)

    return Point(label, gate, measure)


def _svd_point(settings: Settings) -> Point:
    """One square target: our SVD through the factors, PEFT's of the dense sum as it is by default."""
    width = 128 if settings.quick else 2048
    adapters = random_adapters(8, {"q_proj": (width, width)}, 1)
    target = next(iter(adapters[0].targets))

    def peft() -> torch.Tensor:
        return peft_svd([adapter.targets[target].delta() for adapter in adapters], full_matrices=True)

    def ours() -> torch.Tensor:
        return compose.merge(adapters, "sum", rank=16).targets[target].delta.dense()

    def gate() -> None:
        torch.testing.assert_close(ours(), peft(), rtol=1e-3, atol=1e-3 * float(peft().abs().max()))

    def measure() -> Measured:
        rounds = settings.rounds or 3
        mine = Timing(tuple(seconds(lambda: compose.merge(adapters, "sum", rank=16), "cpu") for _ in range(rounds)))
        theirs = Timing(tuple(seconds(peft, "cpu") for _ in range(rounds)))
        wanted = None if settings.quick else 100.0
        ratio = theirs.best / mine.best
        return Measured([Check("speed-up against PEFT's svd", ratio, ">=", wanted, "x")], mine, theirs)

    return Point(f"sum to rank 16, one target {width}x{width}, 8 adapters", gate, measure)


def _memory_point(method: str, settings: Settings) -> Point:
    """Fresh processes: what a merge holds; where lines are streamed, also with more and more adapters."""
    streamed = not METHODS[method].contract.low_rank
    counts, shapes = ((2, 4), "110m-layer") if settings.quick else ((8, 20, 40), "110m")
    counts = counts if streamed else counts[:1]

    def gate() -> None:
        found = memory_of_merge(method, 2, shapes)
        if not 0 < found["growth"] < found["peak"]:
            raise AssertionError(f"memory cannot be read: {found}")

    def measure() -> Measured:
        rows = {count: memory_of_merge(method, count, shapes) for count in counts}
        mebibytes = 2**20
        checks = [
            Check(f"growth during the merge, {count} adapters of {row['adapters'] / count / mebibytes:.0f} MiB",
                  row["growth"] / mebibytes, unit="MiB")
            for count, row in rows.items()
        ]  # fmt: skip
        few, many = rows[counts[0]], rows[counts[-1]]
        checks.append(Check(f"peak of the process, {counts[0]} adapters", few["peak"] / mebibytes, "<=", 512.0, "MiB"))
        if streamed:
            extra = (many["growth"] - few["growth"]) / (many["adapters"] - few["adapters"])
            checks.append(Check("growth per further byte of adapters", extra, "<=", 0.1))
        return Measured(checks)

    return Point(f"memory of {method}", gate, measure)


def small_adapters(count: int) -> list[Adapter]:
    """Return adapters of one layer that whole SVDs of dense deltas can take."""
    return random_adapters(count, WIDTHS_110M, 1, rank=2, shrink=16)


def doubled(adapter: Adapter, targets: list[str]) -> Adapter:
    """Return the adapter with some of its targets, in float64."""
    updates = {target: adapter.targets[target] for target in targets}
    exact = {target: LowRank(u.a.double(), u.b.double(), u.scaling) for target, u in updates.items()}
    return Adapter(adapter.name, adapter.base, exact)
