"""The shipped demo as benchmarks use it: base, twenty of its adapters, and shots of its held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS, shots
from compose.fewshot.loading import load_model
from compose.text.encoding import Encoded, encode
from compose.text.examples import Example

MAX_RANK = 8
TASK_NAMES = tuple(
    [task.name for task in TASKS.values() if task.group == "wording"][:3]
    + [task.name for task in TASKS.values() if task.group == "composition"][:3]
)


def base() -> Any:
    """Return a new instance of the base model."""
    return load_model(demo_base()).model


def bank(count: int) -> Bank:
    """Return ``count`` adapters of rank at most 8 in the bank's order, those that the tasks draw on among them."""
    whole = Bank.open(demo_bank())
    wanted = {skill for name in TASK_NAMES for skill in TASKS[name].skills}
    small = [name for name in whole.names if max(whole[name].ranks.values()) <= MAX_RANK]
    others = [name for name in small if name not in wanted][: count - len(wanted)]
    return whole.select([name for name in small if name in wanted or name in others])


def task_shots(name: str, count: int = 5, draw: int = 0) -> list[Encoded]:
    """Return encoded shots of a task."""
    loaded = load_model(demo_base())
    examples = [Example(one.input, one.output) for one in shots(TASKS[name], count, draw)]
    return encode(examples, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)


def aligned(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return the same adapters with one rank, one scaling and one set of targets, as LoRAHub's procedure needs them.

    Ranks are padded with zero rows, missing targets are zeros, scalings are folded into B.
    """
    shapes = {
        target: (update.in_features, update.out_features)
        for adapter in adapters
        for target, update in adapter.targets.items()
    }
    rank = max(max(adapter.ranks.values()) for adapter in adapters)
    return [
        Adapter(
            adapter.name,
            adapter.base,
            {target: _padded(adapter.targets.get(target), rank, *shapes[target]) for target in sorted(shapes)},
        )
        for adapter in adapters
    ]


def _padded(update: LowRank | None, rank: int, width_in: int, width_out: int) -> LowRank:
    a, b = torch.zeros(rank, width_in), torch.zeros(width_out, rank)
    if update is not None:
        a[: update.rank] = update.a
        b[:, : update.rank] = update.b * (update.scaling / 2.0)
    return LowRank(a, b, 2.0)
