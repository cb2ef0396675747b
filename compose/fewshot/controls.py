"""Controls: what a composition has to be compared with before anyone believes it (arXiv:2602.12323)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compose.bank import Bank
from compose.engine.attach import AttachedModel, attach
from compose.engine.coefficients import Coefficients
from compose.fewshot.loading import LoadedModel
from compose.fewshot.losses import response_losses
from compose.fewshot.procedure import SearchOutcome, run_search
from compose.fewshot.random_bank import random_bank
from compose.fewshot.scoring import Scores, constant_scores, score
from compose.fewshot.settings import CONTROLS, SearchSettings
from compose.fewshot.trained_lora import train_on_shots
from compose.text.encoding import Encoded
from compose.text.examples import Example

CHEAP_FLOPS = {"cpu": 3e13, "cuda": 5e15}
"""Up to so many operations a control that costs as much as the search runs without being asked for."""


@dataclass(frozen=True)
class Control:
    """One line of the comparison.

    Attributes:
        name: ``"composed"`` or a name of `CONTROLS`.
        label: The name for people.
        note: What exactly was compared.
        shots_losses: ``(S,)`` loss per shot, ``None`` where nothing is scored by a model.
        cost: Forward-equivalents spent to obtain it.
        scores: Results on the test items, ``None`` without test items.
    """

    name: str
    label: str
    note: str
    shots_losses: np.ndarray | None
    cost: float
    scores: Scores | None


@dataclass(frozen=True)
class Measured:
    """What is measured on: the shots, encoded, and the test items (maybe none)."""

    loaded: LoadedModel
    examples: Sequence[Example]
    shots: Sequence[Encoded]
    test: Sequence[Example]

    def control(self, name: str, label: str, note: str, cost: float) -> Control:
        """Measure the model as it stands now."""
        with torch.no_grad():
            shots_losses = response_losses(self.loaded.model, self.shots).double().cpu().numpy()
        return Control(name, label, note, shots_losses, cost, score(self.loaded, self.test) if self.test else None)


def bank_controls(
    measured: Measured, attached: AttachedModel, outcome: SearchOutcome, singles: np.ndarray, wanted: Sequence[str]
) -> list[Control]:
    """Return ``composed`` and the wanted of base, constant, uniform and best single; they share the attached bank.

    Args:
        measured: Shots and test items.
        attached: The model with the candidates attached.
        outcome: The search's result.
        singles: ``(N,)`` mean loss on the shots of every candidate alone.
        wanted: Names of `CONTROLS`.
    """
    names = attached.bank.names
    best = int(np.argmin(singles))
    with attached.using(outcome.coefficients):
        found = [measured.control("composed", "composed", outcome.label, outcome.result.cost)]
    if "base" in wanted:
        with attached.using(None):
            found.append(measured.control("base", "base model", "no adapter", 1.0))
    if "constant" in wanted:
        found.append(_constant(measured))
    if "uniform" in wanted:
        with attached.using(Coefficients(torch.full((len(names),), 1.0 / len(names)))):
            found.append(measured.control("uniform", "uniform", f"every candidate at 1/{len(names)}", 1.0))
    if "best_single" in wanted:
        with attached.using(names[best]):
            note = f"{names[best]} alone, the lowest loss on the shots"
            found.append(measured.control("best_single", "best single", note, float(len(names))))
    return found


def random_bank_control(
    measured: Measured, bank: Bank, settings: SearchSettings, outcome: SearchOutcome, groups: dict[str, int] | None
) -> Control:
    """Run the same search over random adapters of the same norms and measure what it finds."""
    with attach(measured.loaded.model, random_bank(bank, seed=settings.seed)) as attached:
        found = run_search(attached, measured.shots, settings, groups=groups, cost=outcome.result.cost)
        note = f"the same search over random adapters of the same norms; chose {found.result.choice}"
        with attached.using(found.coefficients):
            return measured.control("random_bank", "random bank", note, found.result.cost)


def trained_lora_control(measured: Measured, bank: Bank, settings: SearchSettings, cost: float) -> Control:
    """Train one small LoRA on the shots at equal cost and measure it."""
    attached = train_on_shots(
        measured.loaded,
        bank,
        measured.shots,
        cost=cost,
        rank=settings.lora_rank,
        learning_rate=settings.lora_learning_rate,
        seed=settings.seed,
    )
    with attached:
        note = f"one LoRA of rank {settings.lora_rank} trained on the shots at equal cost"
        return measured.control("trained_lora", "LoRA on the shots", note, cost)


def wanted_controls(settings: SearchSettings, measured: Measured, cost: float) -> tuple[list[str], list[str]]:
    """Return the controls to run, and warnings about those left out because they are expensive."""
    if settings.controls is not None:
        return [name for name in CONTROLS if name in settings.controls], []
    model = measured.loaded.model
    tokens = sum(shot.length for shot in measured.shots)
    flops = 2.0 * cost * tokens * sum(parameter.numel() for parameter in model.parameters())
    if flops <= CHEAP_FLOPS.get(model.device.type, CHEAP_FLOPS["cpu"]):
        return list(CONTROLS), []
    warning = (
        f"random_bank and trained_lora were left out: each costs as much as the search ({flops:.1e} operations); "
        "ask for them with --controls"
    )
    return [name for name in CONTROLS if name not in ("random_bank", "trained_lora")], [warning]


def _constant(measured: Measured) -> Control:
    counts = Counter(example.output for example in measured.examples)
    answer = max(counts, key=lambda text: (counts[text], -list(counts).index(text)))
    scores = constant_scores(measured.test, answer) if measured.test else None
    return Control("constant", "constant label", f"always {answer!r}, the most frequent output", None, 0.0, scores)
