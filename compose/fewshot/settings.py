"""The settings of a few-shot search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compose.engine.coefficients import Combine
from compose.errors import ComposeError
from compose.fewshot.preselect import Preselect

CONTROLS = ("base", "constant", "uniform", "best_single", "random_bank", "trained_lora")
"""Names of the controls, cheapest first; the last two cost as much as the search itself."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Everything that decides a few-shot search besides model, bank and examples.

    Attributes:
        strategy: A registered strategy or ``"auto"`` (staged, guarded).
        combine: ``"outputs"`` (sum of the adapters' outputs, exact for any ranks) or ``"parameters"`` (LoRAHub).
        layers: Coefficients per adapter and group of layers: ``"each"`` layer, a number of groups, 1 for one per
            adapter; ``None``: each layer for ``"auto"``, which decides by validation, and 1 for a named strategy.
        budget: Forward-equivalents the search may spend; ``None``: 1000.
        evaluations: Candidates the search may evaluate (LoRAHub's way of counting); ``None``: no limit of its own.
        candidates: Adapters that enter the search at most.
        preselect: How they are chosen from a larger bank: by the ``"loss"`` of each alone, at ``"random"`` as in
            LoRAHub's paper, or by ``"embedding"`` of the shots (needs a ranker).
        l1: Weight of the mean absolute coefficient in the objective.
        smoothness: Weight of the mean squared difference of neighbouring layer groups.
        folds: Folds over the shots by which ``"auto"`` judges candidates, at least 2; 0 compares them on the shots
            themselves.
        seed: Of every random choice.
        rank: Recompress the result to at most this rank.
        controls: Names out of `CONTROLS`; ``None``: all, but the expensive two only where they are cheap.
        max_tokens: Tokens in one forward of the population; ``None``: 16,384.
        lora_rank: Rank of the LoRA trained on the shots.
        lora_learning_rate: Its learning rate.
        bootstrap: Resamples of the test items for the intervals.
    """

    strategy: str = "auto"
    combine: Combine = "outputs"
    layers: int | Literal["each"] | None = None
    budget: float | None = None
    evaluations: int | None = None
    candidates: int = 20
    preselect: Preselect = "loss"
    l1: float = 0.2
    smoothness: float = 0.0
    folds: int = 5
    seed: int = 0
    rank: int | None = None
    controls: tuple[str, ...] | None = None
    max_tokens: int | None = None
    lora_rank: int = 8
    lora_learning_rate: float = 2e-3
    bootstrap: int = 1000

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {value}"
            for name in ("candidates", "rank", "evaluations", "budget", "max_tokens", "lora_rank", "bootstrap")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        problems += [
            f"{name} must not be negative, got {value}"
            for name in ("l1", "smoothness", "seed", "folds")
            if (value := getattr(self, name)) < 0
        ]
        for name, allowed in (("combine", ("outputs", "parameters")), ("preselect", ("loss", "random", "embedding"))):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not (self.layers is None or self.layers == "each" or (isinstance(self.layers, int) and self.layers >= 1)):
            problems.append(f"layers must be 'each' or a number of at least 1, got {self.layers!r}")
        if self.folds == 1:
            problems.append("folds must be 0 or at least 2, got 1")
        unknown = sorted(set(self.controls or ()) - set(CONTROLS))
        if unknown:
            problems.append(f"unknown controls {unknown} (known: {', '.join(CONTROLS)})")
        if problems:
            raise ComposeError("settings: " + "; ".join(problems))
