"""Which strategy of the torch paths is fastest: a linear cost model whose constants were fitted to measured times.

``policy_table.py`` holds the constants, per op, dtype and mode; ``python -m compose.kernels.measure`` measures and
writes them. The figures only rank strategies against each other: all of them compute the same thing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

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
    active_rows: int
    all_rows: int
    longest: int
    products: int
    copied_rows: int
    width: int
    itemsize: int


def features(strategy: Strategy, work: Work) -> tuple[float, ...]:
    """The counts that the cost of a strategy is a weighted sum of; the first is 1, for its fixed overhead."""
    w, pairs = work.width, work.tokens * work.chosen
    if strategy == "stacked":
        rows = work.active_rows
        return 1.0, work.tokens * rows * w, work.tokens * w, rows * w, work.tokens * rows
    if strategy == "bag":
        rows = work.all_rows
        return 1.0, work.tokens * rows * w, work.tokens * w, rows * w, work.tokens * rows, work.products * w
    if strategy == "rows":
        gathered = work.lists * work.chosen * work.rank * w
        far = max(0.0, gathered - _CACHE_BYTES / work.itemsize)
        return 1.0, work.lists, gathered, far, work.tokens * work.chosen * work.rank * w, work.tokens * w
    if strategy == "padded":
        lines = work.adapters * work.longest
        return 1.0, work.adapters, lines * w, lines * work.rank * w, work.active_rows * w, pairs * w
    copied = work.copied_rows * w if strategy == "grouped_mm" else 0.0
    return 1.0, work.adapters, pairs * w, work.products * w, work.active_rows * w, copied


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


def fastest(op: Op, dtype: torch.dtype, work: Work, candidates: Iterable[Strategy], *, training: bool) -> Strategy:
    """The strategy of ``candidates`` with the least predicted cost.

    Args:
        op: Which of the two ops: what is kept between calls differs.
        dtype: Of the operands; all but bfloat16 are ranked like float32.
        work: See ``Work``.
        candidates: Strategies that can run these operands.
        training: Whether backward follows.
    """
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    constants = COSTS[f"{op} {name} {'training' if training else 'inference'}"]
    known = [strategy for strategy in candidates if strategy in constants]
    return min(known, key=lambda strategy: cost(strategy, work, constants[strategy]))
