"""Which strategy of the torch paths is fastest: a linear cost model whose constants were fitted to measured times.

``policy_table.py`` holds the constants, per op, dtype and mode; ``python -m compose.kernels.measure`` measures and
writes them. The figures only rank strategies against each other: all of them compute the same thing. bfloat16 has two
tables, for CPUs with and without AMX tiles, in which a product costs so little that other strategies win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple

import torch

from compose.kernels.lines import WHOLE_BYTES
from compose.kernels.policy_table import COSTS
from compose.kernels.routed import grouped_mm_refuses
from compose.kernels.stack import LoraStack

MAX_GATHERED = 1 << 22
"""Most factor entries worth copying for one batch (16 MiB in float32)."""
MAX_GATHERED_ANEW = 1 << 20
"""Most factor entries worth copying in every call."""
_CACHE_BYTES = 1 << 20
"""Gathered factors beyond this size (the level-2 cache) cost more per byte."""

Op = Literal["grouped", "mixture"]
Strategy = Literal["rows", "stacked", "segments", "grouped_mm", "padded", "bag"]


class Work(NamedTuple):
    """What the cost of a strategy depends on.

    Attributes:
        tokens: Rows of ``x``.
        lists: Batch rows with adapters of their own; ``tokens`` where every token has them.
        chosen: Adapters per list, ``K``.
        rank: Largest rank among the adapters that occur.
        adapters: How many occur.
        lined: How many a layout of sorted tokens has.
        active_rows: Their rank rows.
        all_rows: Rank rows of the whole stack.
        longest: Most tokens that one adapter has.
        products: Sum of tokens times rank over the adapters.
        copied_rows: Rank rows to copy where a strategy wants equal ranks side by side.
        width: ``D + O``.
        itemsize: Bytes of one number.
    """

    tokens: int
    lists: int
    chosen: int
    rank: int
    adapters: int
    lined: int
    active_rows: int
    all_rows: int
    longest: int
    products: int
    copied_rows: int
    width: int
    itemsize: int


def features(strategy: Strategy, work: Work) -> tuple[float, ...]:
    """The counts that the cost of a strategy is a weighted sum of.

    The first is 1, for its fixed overhead. The last two: numbers of its rows beyond what the level-2 cache holds, and
    beyond copies so large that the system hands out new pages for them in every call.
    """
    w = work.width
    tokens, pairs = work.tokens * w, work.tokens * work.chosen * w
    if strategy == "stacked":
        rows = work.active_rows
        return 1.0, rows * tokens, tokens, rows * w, work.tokens * rows, *_far(tokens, work)
    if strategy == "bag":
        rows = work.all_rows
        return 1.0, rows * tokens, tokens, rows * w, work.tokens * rows, work.products * w, *_far(tokens, work)
    if strategy == "rows":
        gathered = work.lists * work.chosen * work.rank * w
        far = max(0.0, gathered - _CACHE_BYTES / work.itemsize)
        return 1.0, work.lists, gathered, far, work.rank * pairs, tokens, *_far(tokens, work)
    if strategy == "padded":
        lines = work.lined * work.longest * w
        return 1.0, work.lined, lines, work.rank * lines, work.active_rows * w, pairs, *_far(lines, work)
    copied = work.copied_rows * w if strategy == "grouped_mm" else 0.0
    return 1.0, work.adapters, pairs, work.products * w, work.active_rows * w, copied, *_far(pairs, work)


def _far(numbers: float, work: Work) -> tuple[float, float]:
    """How far rows ``(D + O)`` exceed the cache, and the copies of one side that stay at hand."""
    return (
        max(0.0, numbers - _CACHE_BYTES / work.itemsize),
        max(0.0, numbers - 2 * WHOLE_BYTES / work.itemsize),
    )


def cost(strategy: Strategy, work: Work, constants: tuple[float, ...]) -> float:
    """Predicted microseconds of one CPU core."""
    return sum(count * constant for count, constant in zip(features(strategy, work), constants, strict=True))


def allowed(work: Work, stack: LoraStack, *, kept: bool) -> list[Strategy]:
    """The strategies that can run without copies that are too large; stacked and segments always can.

    ``kept``: Whether gathered factors are kept from call to call. Where every token gathers its own in every call, new
    memory makes large copies cost several times what the model says, so they are bounded more tightly.
    """
    strategies: list[Strategy] = ["stacked", "segments"]
    anew = not kept and work.lists == work.tokens
    if work.lists * work.chosen * work.rank * work.width <= (MAX_GATHERED_ANEW if anew else MAX_GATHERED):
        strategies.append("rows")
    if stack.a_RD.dtype not in (torch.float32, torch.bfloat16):
        return strategies
    strategies.append("bag")
    if work.copied_rows * work.width <= MAX_GATHERED:
        strategies += ["padded"] if grouped_mm_refuses(stack) else ["padded", "grouped_mm"]
    return strategies


@cache
def multiplies_in_tiles() -> bool:
    """Whether this CPU has AMX tiles for bfloat16, as torch reports it; False where torch is too old to say."""
    report: Callable[[], Mapping[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    return bool(report().get("amx_bf16"))


def section(op: Op, dtype: torch.dtype, *, training: bool) -> str:
    """The section of the table that ranks operands of ``dtype`` on this CPU; see ``fastest``."""
    name = "float32"
    if dtype == torch.bfloat16:
        name = "bfloat16_amx" if multiplies_in_tiles() else "bfloat16"
    return f"{op} {name} {'training' if training else 'inference'}"


def fastest(op: Op, dtype: torch.dtype, work: Work, candidates: Iterable[Strategy], *, training: bool) -> Strategy:
    """The strategy of ``candidates`` with the least predicted cost.

    Args:
        op: Which of the two ops: what is kept between calls differs.
        dtype: Of the operands; all but bfloat16 are ranked like float32.
        work: See ``Work``.
        candidates: Strategies that can run these operands.
        training: Whether backward follows.
    """
    constants = COSTS[section(op, dtype, training=training)]
    known = [strategy for strategy in candidates if strategy in constants]
    return min(known, key=lambda strategy: cost(strategy, work, constants[strategy]))
