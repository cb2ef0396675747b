"""Preselection: which adapters of a large bank enter the search; the gains of few-shot search are mostly here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from compose.engine.attach import AttachedModel
from compose.errors import ComposeError
from compose.fewshot.population import PopulationObjective
from compose.text.encoding import Encoded
from compose.text.examples import Example

POPULATION = 256
"""Sums of adapters evaluated in one call; bounds the table of weights where the bank is large."""

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
    """Keep ``keep`` adapters: half by their loss alone, half by their loss added to the best one, all at weight 1.

    An adapter may help only together with another (the second skill of a composition), and alone looks like any other;
    so the second half is chosen beside the best single. Adapters alone are screened by successive halving
    (arXiv:1502.07943): every round doubles the shots and drops the worse half down to ``keep``; the survivors are
    measured on all shots. Pairs are measured on all shots.
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
    ranked = np.array(survivors)[np.argsort(means, kind="stable")].tolist()
    if len(attached.bank) <= keep:
        return Preselection(attached.bank.names, alone, cost)
    first = ranked[: math.ceil(keep / 2)]
    others = [index for index in range(len(attached.bank)) if index not in first]
    paired = pair_losses(attached, shots, first[0], others).mean(axis=1)
    second = np.array(others)[np.argsort(paired, kind="stable")[: keep - len(first)]].tolist()
    kept = sorted([*first, *second])
    return Preselection(tuple(attached.bank.names[index] for index in kept), alone, cost + len(others))


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


def single_losses(attached: AttachedModel, shots: Sequence[Encoded], adapters: Sequence[int]) -> np.ndarray:
    """Loss of every adapter alone on every shot: ``(len(adapters), len(shots))`` float64."""
    return _sum_losses(attached, shots, [[adapter] for adapter in adapters])


def pair_losses(attached: AttachedModel, shots: Sequence[Encoded], first: int, others: Sequence[int]) -> np.ndarray:
    """Loss of ``first`` and each other adapter, both at 1, on every shot: ``(len(others), len(shots))`` float64."""
    return _sum_losses(attached, shots, [[first, other] for other in others])


def _sum_losses(attached: AttachedModel, shots: Sequence[Encoded], sums: Sequence[Sequence[int]]) -> np.ndarray:
    """Losses of sums of adapters, all at weight 1: ``(len(sums), len(shots))`` float64."""
    objective = PopulationObjective(attached, shots)
    losses = []
    for start in range(0, len(sums), POPULATION):
        weights = np.zeros((len(sums[start : start + POPULATION]), len(attached.bank)))
        for row, members in zip(weights, sums[start : start + POPULATION], strict=True):
            row[list(members)] = 1.0
        losses.append(objective(weights).losses)
    return np.concatenate(losses)
