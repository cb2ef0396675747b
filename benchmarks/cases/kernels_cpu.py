"""grouped_lora and mixture_lora on the CPU against loops over adapters, over a grid of shapes.

Beside the speed-up stands how far it could go: the loop over the two bare products (``bare``), which do the needed
multiplications for tokens that already lie together, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from registry import Check, Measured, Point, Settings, case
from timing import interleaved
from torch.nn.functional import linear

from compose.kernels.grouped_lora.op import grouped_lora, plan_groups
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.stack import LoraStack

_SCALING = 0.5


class _Shape(NamedTuple):
    """Tokens, adapters, rank and width of one cell of the grid."""

    tokens: int
    adapters: int
    rank: int
    width: int


_GRID = [
    *(_Shape(*sizes, 1024) for sizes in product((32, 128, 512, 2048), (1, 4, 16, 64), (8, 16, 64))),
    *(_Shape(*sizes, 16, 4096) for sizes in product((32, 128, 512, 2048), (1, 4, 16, 64))),
]
_GATED = [_Shape(tokens, 8, 16, width) for tokens, width in product((32, 128, 512, 2048), (1024, 4096))]
_QUICK = [_Shape(16, 3, 4, 32), _Shape(32, 2, 8, 64)]


class _Cell:
    """Operands of one shape; the factors once as our stack and once as separate parameters, as PEFT holds them."""

    def __init__(self, shape: _Shape, dtype: torch.dtype, *, training: bool) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        tokens, adapters, rank, width = self.shape = shape

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        self.training = training
        self.x, self.dy = draw(tokens, width).requires_grad_(training), draw(tokens, width)
        a, b = draw(adapters * rank, width) / width**0.5, draw(adapters * rank, width)
        self.stack = LoraStack(
            a.requires_grad_(training),
            b.requires_grad_(training),
            torch.full((adapters,), _SCALING),
            (rank,) * adapters,
        )
        split = [(a.detach()[rows], b.detach()[rows].t().contiguous()) for rows in self._rows()]
        self.factors = [(a.clone().requires_grad_(training), b.requires_grad_(training)) for a, b in split]
        self.ids = torch.randint(0, adapters, (tokens,), generator=generator)
        self.names = self.ids.tolist()
        self.plan = plan_groups(self.ids)
        self.gates = torch.rand(1, tokens, adapters, generator=generator).to(dtype)

    def _rows(self) -> list[slice]:
        return [slice(start, start + self.shape.rank) for start in self.stack.offsets[:-1]]

    def ours(self) -> Any:
        """Every token its adapter; the plan is kept, as between the layers of a model."""
        return self._finish(grouped_lora(self.x, self.stack, self.ids, plan=self.plan, backend="cpu"), self._leaves())

    def ours_once(self) -> Any:
        """The same with a plan of its own in every call."""
        return self._finish(grouped_lora(self.x, self.stack, self.ids, backend="cpu"), self._leaves())

    def loop(self) -> Any:
        """PEFT's ``adapter_names=``: per adapter its rows are found, taken, multiplied and added to the result."""
        result = self.x.new_zeros(self.shape.tokens, self.shape.width)
        for name in sorted(set(self.names)):
            rows = [row for row, other in enumerate(self.names) if other == name]
            a, b = self.factors[name]
            result[rows] += linear(linear(self.x[rows], a), b) * _SCALING
        return self._finish(result, [self.x, *(tensor for pair in self.factors for tensor in pair)])

    def ours_gated(self) -> Any:
        """Every token its own gates over all adapters."""
        return mixture_lora(self.x[None], self.stack, self.gates, backend="cpu")[0]

    def loop_gated(self) -> Any:
        """PEFT's X-LoRA: every adapter runs over all tokens, scaled by its gate."""
        result = self.x.new_zeros(self.shape.tokens, self.shape.width)
        for (a, b), gate in zip(self.factors, self.gates[0].unbind(1), strict=True):
            result += linear(linear(self.x * gate[:, None], a), b) * _SCALING
        return result

    def bare(self) -> list[Callable[[], Any]]:
        """The bare products, as one ``bmm`` for each factor and adapter by adapter: the faster one is the bound.

        As many adapters as occur, tokens shared out evenly (rounded down), nothing moved, into fresh memory.
        """
        count = len(self.plan.distinct)
        tokens, width = self.shape.tokens // count, self.shape.width
        x = self.x[: count * tokens].view(count, tokens, width)
        a, b = (factor.view(-1, self.shape.rank, width)[:count] for factor in (self.stack.a_RD, self.stack.b_RO))
        parts = list(zip(x, a.transpose(1, 2), b, strict=True))

        def looped() -> torch.Tensor:
            y = x.new_empty(x.shape)
            for (lines, down, up), out in zip(parts, y, strict=True):
                torch.mm(torch.mm(lines, down), up, out=out)
            return y

        return [lambda: torch.bmm(torch.bmm(x, a.transpose(1, 2)), b), looped]

    def bare_gated(self) -> list[Callable[[], Any]]:
        """The products with all rows, without gates."""
        return [lambda: torch.mm(torch.mm(self.x, self.stack.a_RD.t()), self.stack.b_RO)]

    def _leaves(self) -> list[torch.Tensor]:
        return [self.x, self.stack.a_RD, self.stack.b_RO]

    def _finish(self, y: torch.Tensor, leaves: list[torch.Tensor]) -> Any:
        if not self.training:
            return y
        return y, torch.autograd.grad(y, leaves, self.dy, allow_unused=True)

    def comparable(self, result: Any, *, looped: bool) -> list[torch.Tensor]:
        """Outputs and gradients of either side in one form."""
        if not self.training:
            return [result]
        y, (dx, *factors) = result
        y = y.detach()
        if not looped:
            return [y, dx, *factors]
        held = [t.detach() for pair in self.factors for t in pair]
        factors = [torch.zeros_like(t) if g is None else g for t, g in zip(held, factors, strict=True)]
        return [y, dx, torch.cat(factors[::2]), torch.cat([g.t() for g in factors[1::2]])]


@case(
    "kernels_cpu",
    description="one linear's adapters over 64 shapes: T 32-2048, 1-64 adapters, rank 8-64, d 1024 and 4096",
    baseline="a loop over adapters as in PEFT (adapter_names=, X-LoRA), on the same factors",
    targets="geometric means: forward >= 3x (float32), >= 4x (bfloat16); with backward >= 2x; gates >= 5x (bfloat16)",
    requires=(),
)
def kernels_cpu(settings: Settings) -> Iterator[Point]:
    """Yield one point per dtype and kind of work; its figures are geometric means over the grid."""
    for dtype, forward_target, gated_target in ((torch.float32, 3.0, None), (torch.bfloat16, 4.0, 5.0)):
        name = str(dtype).removeprefix("torch.")
        yield _point(f"{name}, forward", dtype, "grouped", forward_target, settings)
        yield _point(f"{name}, forward and backward", dtype, "trained", 2.0, settings)
        yield _point(f"{name}, dense gates per token, 8 adapters", dtype, "gated", gated_target, settings)


def _point(label: str, dtype: torch.dtype, kind: str, target: float | None, settings: Settings) -> Point:
    bound = 1e-5 if dtype == torch.float32 else 2e-2

    def gate() -> None:
        for cell, ours, loop in _cells(kind, dtype, settings):
            pairs = zip(cell.comparable(ours(), looped=False), cell.comparable(loop(), looped=True), strict=True)
            errors = [float((got.float() - wanted.float()).norm() / wanted.float().norm()) for got, wanted in pairs]
            if not max(errors) <= bound:
                raise AssertionError(f"{cell.shape}: relative errors {errors}, allowed {bound}")

    def measure() -> Measured:
        rounds, at_least = settings.rounds or (1 if settings.quick else 5), 0.0 if settings.quick else 0.01
        cells: list[dict[str, Any]] = []
        for cell, ours, loop in _cells(kind, dtype, settings):
            mine, theirs = interleaved(ours, loop, rounds=rounds, at_least=at_least)
            found = {**cell.shape._asdict(), "ours_us": 1e6 * mine.best, "loop_us": 1e6 * theirs.best}
            if kind == "grouped":
                fresh, _ = interleaved(cell.ours_once, ours, rounds=rounds, at_least=at_least)
                found["new_plan_us"] = 1e6 * fresh.best
            if kind != "trained":
                bounds = cell.bare() if kind == "grouped" else cell.bare_gated()
                timings = interleaved(bounds[0], bounds[-1], rounds=rounds, at_least=at_least)
                found["bare_us"] = 1e6 * min(timing.best for timing in timings)
            cells.append(found)
        return _summary(cells, target)

    return Point(label, gate, measure)


def _summary(cells: list[dict[str, Any]], target: float | None) -> Measured:
    """Geometric means over the shapes."""
    ratios = {
        name: [cell["loop_us"] / cell[f"{name}_us"] for cell in cells]
        for name in ("ours", "new_plan", "bare")
        if f"{name}_us" in cells[0]
    }
    checks = [Check("speed-up, geometric mean", _mean(ratios["ours"]), ">=" if target else "", target, "x")]
    if "new_plan" in ratios:
        checks.append(Check("the same, a new plan in every call", _mean(ratios["new_plan"]), unit="x"))
    if "bare" in ratios:
        checks.append(Check("bound: the bare products", _mean(ratios["bare"]), unit="x"))
    checks.append(Check("lowest", min(ratios["ours"]), unit="x"))
    shapes = [_Shape(*(cell[name] for name in _Shape._fields)) for cell in cells]
    speed_ups = dict(zip(shapes, ratios["ours"], strict=True))
    worst = min(speed_ups, key=speed_ups.__getitem__)
    note = f"{len(cells)} shapes; lowest at {worst}; {_by_width(speed_ups)}"
    return Measured(checks, note=note, cells=cells)


def _cells(
    kind: str, dtype: torch.dtype, settings: Settings
) -> Iterator[tuple[_Cell, Callable[[], Any], Callable[[], Any]]]:
    """Operands, our call and the loop of every shape, one after the other."""
    full = _GATED if kind == "gated" else _GRID
    for shape in _QUICK if settings.quick else full:
        cell = _Cell(shape, dtype, training=kind == "trained")
        yield (cell, cell.ours_gated, cell.loop_gated) if kind == "gated" else (cell, cell.ours, cell.loop)


def _mean(ratios: Any) -> float:
    values = list(ratios)
    return math.exp(sum(map(math.log, values)) / len(values))


def _by_width(ratios: dict[_Shape, float]) -> str:
    widths = sorted({shape.width for shape in ratios})
    return ", ".join(f"d={w}: {_mean(r for s, r in ratios.items() if s.width == w):.2f}x" for w in widths)
