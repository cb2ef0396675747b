"""One search on an attached bank: settings to space, objective, and coefficients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Coefficients
from compose.fewshot.population import DEFAULT_TOKENS, PopulationObjective
from compose.fewshot.settings import SearchSettings
from compose.search.evaluator import Budget, Progress
from compose.search.guard import Guard
from compose.search.journal import JournalFile
from compose.search.procedure import SearchResult, search
from compose.search.space import Space
from compose.text.encoding import Encoded

DEFAULT_BUDGET = 1000.0
"""Forward-equivalents a search may spend unless the settings say otherwise."""


@dataclass(frozen=True)
class SearchOutcome:
    """What a search on a bank found.

    Attributes:
        result: The search's own account.
        coefficients: Ready for the attached model: ``(N,)``, or ``(G, N)`` with groups where layers differ; ``None``
            when the base model was chosen.
        label: The choice in words.
        seconds: Wall time of the search.
    """

    result: SearchResult
    coefficients: Coefficients | None
    label: str
    seconds: float


def search_groups(attached: AttachedModel, settings: SearchSettings) -> dict[str, int] | None:
    """Return target -> layer group as the settings ask, or ``None`` for one coefficient per adapter."""
    layers = settings.layers
    if layers is None:
        layers = "each" if settings.strategy == "auto" else 1
    if layers == 1:
        return None
    return attached.layer_groups(None if layers == "each" else layers)


def search_space(attached: AttachedModel, settings: SearchSettings, groups: Mapping[str, int] | None) -> Space:
    """Return the space of coefficients the settings describe."""
    return Space(
        num_adapters=len(attached.bank),
        num_groups=1 if groups is None else max(groups.values()) + 1,
        l1=settings.l1,
        smoothness=settings.smoothness,
        zero_is_stationary=settings.combine == "parameters",
    )


def search_budget(settings: SearchSettings) -> Budget:
    """Return the budget of the settings."""
    if settings.budget is None and settings.evaluations is not None:
        return Budget(evaluations=settings.evaluations)
    return Budget(cost=settings.budget or DEFAULT_BUDGET, evaluations=settings.evaluations)


def run_search(
    attached: AttachedModel,
    shots: Sequence[Encoded],
    settings: SearchSettings,
    *,
    groups: Mapping[str, int] | None,
    cost: float | None = None,
    journal: JournalFile | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchOutcome:
    """Search coefficients over the attached bank.

    Args:
        attached: The model with the candidate adapters attached.
        shots: The encoded examples.
        settings: Strategy, combine, penalties, seed.
        groups: Target -> layer group, ``None`` for one coefficient per adapter.
        cost: Budget in forward-equivalents instead of the settings' own.
        journal: Where every evaluation is recorded.
        progress: Called after every population.
    """
    objective = PopulationObjective(
        attached,
        shots,
        combine=settings.combine,
        groups=groups,
        max_tokens=settings.max_tokens or DEFAULT_TOKENS,
    )
    started = time.perf_counter()
    result = search(
        objective,
        search_space(attached, settings, groups),
        strategy=settings.strategy,
        budget=search_budget(settings) if cost is None else Budget(cost=max(1.0, cost)),
        seed=settings.seed,
        guard=Guard(max_folds=settings.folds) if settings.strategy == "auto" else None,
        journal=journal,
        progress=progress,
    )
    return SearchOutcome(
        result, _coefficients(result.weights, settings, groups), result.why, time.perf_counter() - started
    )


def _coefficients(
    weights_GN: np.ndarray, settings: SearchSettings, groups: Mapping[str, int] | None
) -> Coefficients | None:
    if not weights_GN.any():
        return None
    values = torch.from_numpy(weights_GN).float()
    if groups is None or bool((values == values[:1]).all()):
        return Coefficients(values[0], settings.combine)
    return Coefficients(values, settings.combine, groups)
