"""A small LoRA trained on the shots: the control that every composition has to beat (arXiv:2602.12323)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.attach import AttachedModel, attach
from compose.engine.coefficients import Coefficients
from compose.fewshot.loading import LoadedModel
from compose.fewshot.losses import response_losses
from compose.fewshot.population import GRADIENT_COST
from compose.text.encoding import Encoded


def fresh_adapter(bank: Bank, *, rank: int, seed: int) -> Adapter:
    """Return an untrained adapter over the bank's targets: ``a`` uniform as in LoRA (arXiv:2106.09685), ``b`` zero."""
    generator = torch.Generator().manual_seed(seed)
    targets = {}
    for target, shape in bank.targets.items():
        bound = 1 / math.sqrt(shape.in_features)
        a = torch.empty(rank, shape.in_features).uniform_(-bound, bound, generator=generator)
        targets[target] = LowRank(a, torch.zeros(shape.out_features, rank), 2.0, shape.kind)
    return Adapter("trained_on_shots", bank.base, targets)


def train_on_shots(
    loaded: LoadedModel,
    bank: Bank,
    shots: Sequence[Encoded],
    *,
    cost: float,
    rank: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> AttachedModel:
    """Train one LoRA on all shots for as many steps as ``cost`` forward-equivalents buy, and leave it attached.

    Adam on the example-weighted mean loss, the learning rate falling linearly to 0. The caller detaches the handle.

    Args:
        loaded: The frozen base model.
        bank: Gives the targets.
        shots: The encoded examples.
        cost: Budget; one step on all shots costs as much as a value and gradient of one candidate.
        rank: Rank of the LoRA; its scaling is 2.
        learning_rate: At the first step.
        seed: Of the initial ``a``.
    """
    attached = attach(loaded.model, Bank.from_adapters([fresh_adapter(bank, rank=rank, seed=seed)]), trainable=True)
    attached.set(Coefficients(torch.ones(1)))
    steps = max(1, int(cost / GRADIENT_COST))
    parameters = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        response_losses(loaded.model, shots).mean().backward()
        optimiser.step()
        schedule.step()
    loaded.model.requires_grad_(False)
    return attached
