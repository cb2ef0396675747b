"""Merging 8 rank-16 adapters over the 84 linear layers of a 110M Llama, method by method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from registry import Check, Measured, Point, Settings, case
from timing import Timing, seconds

import compose
from compose.adapter import Adapter, LowRank
from compose.merging.deltas import Streamed

WIDTH, FFN, LAYERS = 768, 2048, 12
KINDS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (WIDTH, FFN), "mlp.up_proj": (WIDTH, FFN),
    "mlp.down_proj": (FFN, WIDTH),
}  # fmt: skip


class Row(NamedTuple):
    """A method with options, its limit in CPU seconds for all 84 targets, PEFT's function, and what the gate expects.

    The functions take one target's dense deltas.
    """

    method: str
    options: dict[str, Any]
    limit_s: float
    peft: Callable[[list[torch.Tensor]], torch.Tensor] | None = None
    expected: Callable[[list[torch.Tensor]], torch.Tensor] | None = None


def _peft(name: str) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    def run(dense: list[torch.Tensor]) -> torch.Tensor:
        from peft.utils import merge_utils

        return getattr(merge_utils, name)(dense, torch.ones(len(dense)), 0.2 if name == "ties" else 0.5)

    return run


def _sum(dense: list[torch.Tensor]) -> torch.Tensor:
    return sum(dense[1:], dense[0])


def _peft_svd(dense: list[torch.Tensor]) -> torch.Tensor:
    """What PEFT's ``svd`` does with the dense sum (``full_matrices=False``, its cheaper form)."""
    u, s, v = torch.linalg.svd(_sum(dense), full_matrices=False)
    return (u[:, :16] * s[:16]) @ v[:16]


ROWS = (
    Row("sum", {}, 0.08, expected=_sum),
    Row("sum", {"rank": 16}, 0.98, _peft_svd, _peft_svd),
    Row("ties", {"density": 0.2, "semantics": "peft"}, 15.0, _peft("ties"), _peft("ties")),
    Row("dare_ties", {"density": 0.5}, 10.0, _peft("dare_ties")),
    Row("iso", {}, 1.10),
    Row("core_ties", {}, 1.67),
    Row("tsvm", {}, 2.67),
    Row("knots_ties", {}, 4.96),
    Row("ctm", {}, 7.16),
)


@case(
    "merging",
    description="8 rank-16 adapters over 84 targets of a 110M Llama merged by each method, CPU seconds",
    baseline="PEFT 0.21's merge_utils on dense deltas, or its svd, on one layer's seven targets, times twelve",
    targets="the figures of the first prototype per method; TIES <= 15 s, DARE-TIES <= 10 s",
    requires=("peft",),
)
def merging(settings: Settings) -> Iterator[Point]:
    """Yield one point per method; ``quick`` merges one small layer."""
    layers, shrink = (1, 16) if settings.quick else (LAYERS, 1)
    adapters = [_adapter(number, layers, shrink) for number in range(8)]
    for row in ROWS:
        yield _point(row, adapters, layers, settings)


def _adapter(number: int, layers: int, shrink: int) -> Adapter:
    generator = torch.Generator().manual_seed(1000 + number)
    rank, targets = max(2, 16 // shrink), {}
    for layer in range(layers):
        for kind, (width, out) in KINDS.items():
            a = torch.randn(rank, width // shrink, generator=generator)
            b = torch.randn(out // shrink, rank, generator=generator)
            targets[f"model.layers.{layer}.{kind}"] = LowRank(a, b, 2.0)
    return Adapter(f"adapter-{number}", "benchmark", targets)


def _point(row: Row, adapters: list[Adapter], layers: int, settings: Settings) -> Point:
    label = f"{row.method}{' to rank 16' if 'rank' in row.options else ''}"
    first = list(adapters[0].targets)[: len(KINDS)]

    def dense_of(function: Callable[[list[torch.Tensor]], torch.Tensor], given: list[Adapter]) -> list[torch.Tensor]:
        return [function([adapter.targets[target].delta() for adapter in given]) for target in first]

    def gate() -> None:
        """In float64, where no entry sits at a threshold by rounding."""
        double = [_double(adapter, first) for adapter in adapters]
        merged = compose.merge(double, row.method, **row.options)
        found = [merged.targets[target].delta.dense() for target in first]
        if not all(delta.isfinite().all() for delta in found):
            raise AssertionError(f"{label}: not finite")
        for delta, expected in zip(found, dense_of(row.expected, double) if row.expected else found, strict=True):
            torch.testing.assert_close(delta, expected, rtol=1e-7, atol=1e-7)

    def measure() -> Measured:
        rounds = settings.rounds or (1 if settings.quick else 3)
        mine = Timing(tuple(seconds(lambda: _consume(row, adapters), "cpu") for _ in range(rounds)))
        checks = [Check("CPU seconds, all targets", mine.best, "<=", None if settings.quick else row.limit_s, "s")]
        if row.peft is None:
            return Measured(checks, mine)
        peft = row.peft
        theirs = Timing(tuple(seconds(lambda: dense_of(peft, adapters), "cpu") * layers for _ in range(rounds)))
        return Measured([*checks, Check("speed-up against PEFT", theirs.best / mine.best, unit="x")], mine, theirs)

    return Point(label, gate, measure)


def _consume(row: Row, adapters: list[Adapter]) -> None:
    """Merge all targets; lines that are computed on demand are, as when they are added to a weight."""
    for target in compose.merge(adapters, row.method, **row.options).targets.values():
        if isinstance(target.delta, Streamed):
            for _ in target.delta.chunks(512):
                pass


def _double(adapter: Adapter, targets: list[str]) -> Adapter:
    updates = {target: adapter.targets[target] for target in targets}
    doubled = {target: LowRank(u.a.double(), u.b.double(), u.scaling) for target, u in updates.items()}
    return Adapter(adapter.name, adapter.base, doubled)
