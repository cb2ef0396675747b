"""Preselection: which adapters of a large bank enter the search; the gains of few-shot search are mostly here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import AdapterIds
from compose.errors import ComposeError
from compose.fewshot.encoding import Encoded
from compose.fewshot.examples import Example
from compose.fewshot.losses import response_losses
from compose.fewshot.population import DEFAULT_TOKENS

Preselect = Literal["loss", "random", "embedding"]
Ranker = Callable[[Sequence[Example]], Sequence[str]]
"""Names of the bank's adapters, the most promising first, for a few examples of one task (the retriever's hook)."""


class Preselection(NamedTuple):
    """Which adapters enter the search.

    Attributes:
        names: Kept adapters, in the bank's order.
        alone: Name -> mean loss on the shots of this adapter alone, where it was measured on all shots.
        cost: Forward-equivalents spent.
    """

    names: tuple[str, ...]
    alone: dict[str, float]
    cost: float


def preselect_by_loss(attached: AttachedModel, shots: Sequence[Encoded], keep: int) -> Preselection:
    """Keep the ``keep`` adapters of lowest loss, each alone at weight 1, by successive halving (arXiv:1502.07943).

    Every round doubles the shots and drops the worse half; the survivors are measured on all shots.
    """
    survivors = list(range(len(attached.bank)))
    rounds = max(0, math.ceil(math.log2(len(survivors) / keep))) if len(survivors) > keep else 0
    cost = 0.0
    for step in range(rounds):
        count = max(1, len(shots) >> (rounds - step))
        means = single_losses(attached, shots[:count], survivors).mean(axis=1)
        cost += len(survivors) * count / len(shots)
        left = max(keep, math.ceil(len(survivors) / 2))
        survivors = sorted(np.array(survivors)[np.argsort(means, kind="stable")[:left]].tolist())
    means = single_losses(attached, shots, survivors).mean(axis=1)
    cost += len(survivors)
    alone = {attached.bank.names[index]: float(mean) for index, mean in zip(survivors, means, strict=True)}
    kept = sorted(np.array(survivors)[np.argsort(means, kind="stable")[:keep]].tolist())
    return Preselection(tuple(attached.bank.names[index] for index in kept), alone, cost)


def preselect_at_random(names: Sequence[str], keep: int, seed: int) -> Preselection:
    """Keep ``keep`` adapters drawn without replacement, as LoRAHub does (arXiv:2307.13269)."""
    drawn = np.random.default_rng(seed).permutation(len(names))[:keep]
    return Preselection(tuple(names[index] for index in sorted(drawn)), {}, 0.0)


def preselect_by_ranker(
    names: Sequence[str], keep: int, ranker: Ranker | None, examples: Sequence[Example]
) -> Preselection:
    """Keep the first ``keep`` adapters a ranker names (retrieval by the embedding of the shots).

    Raises:
        ComposeError: There is no ranker, or it names an adapter that is not in the bank.
    """
    if ranker is None:
        raise ComposeError(
            "preselect='embedding' needs a ranker (few_shot_search(..., ranker=...)); else use 'loss' or 'random'"
        )
    ranked = list(dict.fromkeys(ranker(examples)))
    unknown = [name for name in ranked if name not in names]
    if unknown or len(ranked) < min(keep, len(names)):
        raise ComposeError(
            f"the ranker must name at least {min(keep, len(names))} adapters of the bank, it named {len(ranked)}, "
            f"unknown: {unknown[:5]}"
        )
    kept = set(ranked[:keep])
    return Preselection(tuple(name for name in names if name in kept), {}, 0.0)


@torch.no_grad()
def single_losses(
    attached: AttachedModel, shots: Sequence[Encoded], adapters: Sequence[int], *, max_tokens: int = DEFAULT_TOKENS
) -> np.ndarray:
    """Loss of every adapter alone on every shot: ``(len(adapters), len(shots))`` float64.

    Rows of the batch carry their own adapter, so the cost does not grow with the bank.
    """
    losses = np.empty((len(adapters), len(shots)))
    order = sorted(range(len(shots)), key=lambda index: (shots[index].length, index))
    pairs = [(row, shot) for shot in order for row in range(len(adapters))]
    size = max(1, max_tokens // max(shot.length for shot in shots))
    for start in range(0, len(pairs), size):
        chunk = pairs[start : start + size]
        with attached.using(AdapterIds(torch.tensor([adapters[row] for row, _ in chunk]))):
            found = response_losses(attached.model, [shots[shot] for _, shot in chunk])
        rows, columns = zip(*chunk, strict=True)
        losses[list(rows), list(columns)] = found.double().cpu().numpy()
    return losses
