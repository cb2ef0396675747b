"""Positive pairs of one task, and batches in which no task stands twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """Two different inputs of one task per row.

    Attributes:
        anchors: Texts.
        positives: Texts.
        tasks: Task of every row.
    """

    anchors: list[str]
    positives: list[str]
    tasks: list[str]


def draw_pairs(texts: Mapping[str, Sequence[str]], rounds: int, seed: int) -> Pairs:
    """Pair the inputs of every task at random, anew in every round; an odd one out waits for the next round.

    Args:
        texts: Task -> distinct inputs, at least two.
        rounds: How often every input is used, about.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    pairs = Pairs([], [], [])
    for _ in range(rounds):
        for task in sorted(texts):
            order = generator.permutation(len(texts[task]))
            for left, right in zip(order[0::2], order[1::2], strict=False):
                pairs.anchors.append(texts[task][left])
                pairs.positives.append(texts[task][right])
                pairs.tasks.append(task)
    return pairs


def distinct_batches(tasks: Sequence[str], batch_size: int, seed: int) -> list[list[int]]:
    """Cut rows into batches in which every task stands at most once.

    In-batch negatives take the other rows for other tasks; two rows of one task would push apart what belongs
    together. For every batch tasks are drawn without replacement, in proportion to the rows they have left, so that
    large tasks do not pile up at the end. With fewer tasks than ``batch_size`` batches are as large as there are
    tasks. Rows that would be alone in their batch, having no negative, are left out.

    Args:
        tasks: Task of every row.
        batch_size: Rows per batch at most.
        seed: Of the draws.

    Returns:
        Batches of row numbers, each of at least two.
    """
    generator = np.random.default_rng(seed)
    names = sorted(set(tasks))
    rows: list[list[int]] = [[] for _ in names]
    index = {name: number for number, name in enumerate(names)}
    for row in generator.permutation(len(tasks)):
        rows[index[tasks[row]]].append(int(row))
    batches = []
    left = np.array([len(group) for group in rows], np.float64)
    while (count := min(batch_size, int((left > 0).sum()))) >= 2:
        with np.errstate(divide="ignore"):
            keys = np.log(left) + generator.gumbel(size=len(left))  # the largest keys: a draw without replacement
        chosen = np.argsort(-keys, kind="stable")[:count]
        batches.append([rows[number].pop() for number in chosen])
        left[chosen] -= 1
    return batches
