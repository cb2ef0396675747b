"""Training of all adapters at once, each alone: rows of the batch belong to one adapter and gradients never mix."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compose.demo.network import PAD_ID, TARGETS, Shape, hidden_states, response_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What one adapter looks like.

    Attributes:
        name: Its name, which is also the name of its upstream task.
        rank: LoRA rank.
        targets: Names as in :data:`compose.demo.network.TARGETS`.
        alpha: LoRA alpha.
        rank_stabilised: Whether the scaling is alpha / sqrt(rank) instead of alpha / rank.
    """

    name: str
    rank: int
    targets: tuple[str, ...]
    alpha: float
    rank_stabilised: bool = False

    @property
    def scaling(self) -> float:
        """The multiplier that is applied."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


@dataclass(frozen=True, kw_only=True)
class BankTraining:
    """Hyperparameters of one adapter's training (the same for all).

    Attributes:
        steps: Optimiser steps.
        batch: Rows per adapter and step.
        learning_rate: Peak; linear warm-up over 5 %, then linear to zero.
        weight_decay: Decoupled decay of both factors.
        stop_at: An adapter stops when its running exact match on training rows reaches this; above 1: never.
        shared_a: Whether adapters start from the same A (cut to their rank).
    """

    steps: int = 250
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    stop_at: float = 2.0
    shared_a: bool = True


class StackedAdapters:
    """The factors of ``E`` adapters, padded to the largest rank ``R``.

    Attributes:
        a: Per target ``(L, E, R, I)``.
        b: Per target ``(L, E, O, R)``.
        mask: Per target ``(E, R)``, one where an adapter has that row.
        scaling: ``(E,)``.
    """

    def __init__(
        self, shape: Shape, specs: Sequence[AdapterSpec], seed: int, shared_a: bool, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rank, count = max(spec.rank for spec in specs), len(specs)
        self.specs = list(specs)
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.mask: dict[str, Tensor] = {}
        self.scaling = torch.tensor([spec.scaling for spec in specs], device=device)
        for target in TARGETS:
            wide, out = shape.dimensions(target)
            first = torch.empty(shape.layers, 1 if shared_a else count, rank, wide).uniform_(
                -1, 1, generator=generator
            )
            rows = torch.tensor([[i < spec.rank and target in spec.targets for i in range(rank)] for spec in specs])
            self.mask[target] = rows.float().to(device)
            self.a[target] = (first.expand(-1, count, -1, -1) * wide**-0.5 * rows[None, :, :, None]).to(device)
            self.b[target] = torch.zeros(shape.layers, count, out, rank, device=device)

    def parameters(self) -> list[Tensor]:
        """All factors, A and B alternating."""
        return [factor for target in TARGETS for factor in (self.a[target], self.b[target])]

    def delta(self, layer: int, target: str, x: Tensor) -> Tensor:
        """Each adapter on its own rows: ``x (E, N, T, I)`` to ``(E, N, T, O)``."""
        a_ERI = self.a[target][layer] * (self.mask[target] * self.scaling[:, None])[:, :, None]
        h = torch.bmm(x.flatten(1, 2), a_ERI.to(x.dtype).transpose(1, 2))
        return torch.bmm(h, self.b[target][layer].to(x.dtype).transpose(1, 2)).unflatten(1, x.shape[1:3])


def train_bank(
    shape: Shape,
    base: dict[str, Tensor],
    adapters: StackedAdapters,
    rows: Tensor,
    options: BankTraining,
    seed: int,
) -> Tensor:
    """Train every adapter in place on its own rows ``(E, N, T)`` of token ids; returns the step each stopped at."""
    device, count = rows.device, len(adapters.specs)
    factors = adapters.parameters()
    for factor in factors:
        factor.requires_grad_()
    optimizer = torch.optim.AdamW(factors, lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(seed)
    embedding = base["model.embed_tokens.weight"]
    stopped = torch.full((count,), options.steps, device=device)
    running = torch.zeros(count, device=device)
    started = time.monotonic()
    for step in range(options.steps):
        chosen = torch.randint(rows.shape[1], (count, options.batch), generator=generator, device=device)
        ids = rows.gather(1, chosen[:, :, None].expand(-1, -1, rows.shape[2]))
        ids = ids[:, :, : int((ids != PAD_ID).any(0).any(0).sum())]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = hidden_states(shape, base, functional.embedding(ids, embedding), adapters.delta)
            loss, correct = response_loss(hidden, embedding, ids)
        tokens = (loss > 0).sum((1, 2)).clamp(min=1)
        optimizer.zero_grad()
        (loss.sum((1, 2)) / tokens).sum().backward()
        running = 0.8 * running + 0.2 * correct.all(-1).float().mean(1)
        stopped = torch.where((running >= options.stop_at) & (stopped == options.steps), step, stopped)
        if bool((stopped < options.steps).all()):
            break
        _step(optimizer, factors, (stopped == options.steps).float(), step, options)
        if step % 100 == 0 or step == options.steps - 1:
            seconds = time.monotonic() - started
            logger.info("bank step %d mean running match %.3f seconds %.0f", step, running.mean(), seconds)
    for factor in factors:
        factor.requires_grad_(False)
    return stopped


def _step(
    optimizer: torch.optim.Optimizer, factors: list[Tensor], active: Tensor, step: int, options: BankTraining
) -> None:
    """One AdamW step with per-adapter clipping; adapters that stopped keep their values."""
    rate = min((step + 1) / (0.05 * options.steps), 1.0) * (1 - step / options.steps)
    norms = torch.stack([factor.grad.square().sum((0, 2, 3)) for factor in factors if factor.grad is not None]).sum(0)
    clip = (1.0 / norms.sqrt().clamp(min=1.0))[None, :, None, None]
    with torch.no_grad():
        for factor in factors:
            if factor.grad is not None:
                factor.grad *= clip
        before = [factor.clone() for factor in factors]
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        optimizer.step()
        shrink = 1 - options.learning_rate * rate * options.weight_decay
        for factor, old in zip(factors, before, strict=True):
            factor.copy_(torch.where(active[None, :, None, None] > 0, factor * shrink, old))
