"""Pretraining of the base: programs are switched on by adding their codes' vectors to every embedding.

The vectors are thrown away afterwards, so nothing that can be typed reaches the skills: an adapter has to find how to
switch one on, and two adapters that each found it can be added. Two disturbances make the switches sharp. Faint codes
and random directions must be ignored, so a sum of adapters is not upset by what each adds besides its switch, and a
few examples alone do not lead a fresh LoRA to a switch.
"""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compose.demo.network import END_ID, PAD_ID, Shape, hidden_states, initial_parameters, response_loss
from compose.demo.pretraining_data import END_BYTE, NO_CODE, PAD_BYTE, Rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Hyperparameters.

    Attributes:
        steps: Optimiser steps.
        batch: Rows per step.
        learning_rate: Peak of the schedule: linear warm-up over 2 %, then cosine to zero.
        weight_decay: Decoupled decay of matrices.
        code_scale: Range of the random factor of each code vector, drawn per row and code.
        code_length: Initial standard deviation of a code vector's entries.
        faint: Largest factor of a code that must be ignored; half of the rows carry one such code.
        noise: Largest length of a random direction that must be ignored, in mean code lengths.
    """

    steps: int = 5500
    batch: int = 2048
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    code_scale: tuple[float, float] = (0.75, 1.5)
    code_length: float = 0.05
    faint: float = 0.4
    noise: float = 1.0


def to_ids(rows: np.ndarray, device: torch.device) -> Tensor:
    """Token ids of encoded rows: bytes, with the end and padding marks replaced."""
    tokens = torch.as_tensor(rows).to(device).long()
    return tokens.masked_fill_(tokens == PAD_BYTE, PAD_ID).masked_fill_(tokens == END_BYTE, END_ID)


def pretrain(shape: Shape, rows: Rows, options: Pretraining, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Train a base model on the rows and return its parameters in float32 on the device."""
    torch.manual_seed(seed)
    parameters = {name: value.to(device) for name, value in initial_parameters(shape, seed).items()}
    codes = torch.randn(NO_CODE + 1, shape.hidden, device=device) * options.code_length
    codes[NO_CODE] = 0
    trained = [*parameters.values(), codes]
    for value in trained:
        value.requires_grad_()
    matrices = [value for value in parameters.values() if value.ndim == 2]
    others = [value for value in parameters.values() if value.ndim == 1] + [codes]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))
    tokens, programs = torch.as_tensor(rows.tokens).to(device), torch.as_tensor(rows.codes).to(device)
    forward = torch.compile(_loss, dynamic=False) if device.type == "cuda" else _loss
    order = torch.randperm(len(tokens), device=device)
    started = time.monotonic()
    for step in range(options.steps):
        first = step * options.batch % (len(tokens) - options.batch)
        chosen = order[first : first + options.batch]
        ids = tokens[chosen].long()
        active, scale = _disturb(programs[chosen].long(), options)
        noise = torch.randn(options.batch, shape.hidden, device=device)
        length = codes[:NO_CODE].detach().norm(dim=-1).mean() * torch.rand(options.batch, 1, device=device)
        noise = functional.normalize(noise, dim=-1) * length * options.noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(shape, parameters, codes, ids, active, scale, noise)
        optimizer.zero_grad()
        loss.backward()
        if codes.grad is not None:
            codes.grad[NO_CODE] = 0
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == options.steps - 1:
            logger.info("step %d loss %.4f seconds %.0f", step, loss.item(), time.monotonic() - started)
    _report(shape, parameters, codes, rows, device)
    return {name: value.detach() for name, value in parameters.items()}


def _rate(step: int, steps: int) -> float:
    warm = max(1, steps // 50)
    return (step + 1) / warm if step < warm else 0.5 * (1 + float(np.cos(np.pi * (step - warm) / (steps - warm))))


def _disturb(programs: Tensor, options: Pretraining) -> tuple[Tensor, Tensor]:
    """Random factors of the codes ``(N, MAX_CODES)``, and in half of the rows one more code, faint."""
    faint = torch.randint(NO_CODE, (len(programs), 1), device=programs.device)
    faint = torch.where(torch.rand(faint.shape, device=programs.device) < 0.5, faint, NO_CODE)
    scale = torch.empty(programs.shape, device=programs.device).uniform_(*options.code_scale)
    faint_scale = torch.empty(faint.shape, device=programs.device).uniform_(0, options.faint)
    faint = torch.where((programs == faint).any(1, keepdim=True), NO_CODE, faint)
    return torch.cat((programs, faint), 1), torch.cat((scale, faint_scale), 1)


def _embed(parameters: dict[str, Tensor], ids: Tensor, codes: Tensor, programs: Tensor, scale: Tensor) -> Tensor:
    vector = (codes[programs] * scale.unsqueeze(-1)).sum(1, keepdim=True)
    return functional.embedding(ids, parameters["model.embed_tokens.weight"]) + vector


def _loss(
    shape: Shape,
    parameters: dict[str, Tensor],
    codes: Tensor,
    rows: Tensor,
    programs: Tensor,
    scale: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean cross-entropy of response tokens; shapes are static so that it compiles once."""
    ids = torch.where(rows == PAD_BYTE, PAD_ID, torch.where(rows == END_BYTE, END_ID, rows))
    embedded = _embed(parameters, ids, codes, programs, scale) + noise[:, None]
    hidden = hidden_states(shape, parameters, embedded)
    targets = ids[:, 1:]
    mask = ((ids == 10).cumsum(-1)[:, :-1] > 0) & (targets != PAD_ID)
    logits = functional.linear(hidden[:, :-1], parameters["model.embed_tokens.weight"]).float()
    return functional.cross_entropy(
        logits.flatten(0, 1), targets.masked_fill(~mask, -100).flatten(), ignore_index=-100
    )


@torch.no_grad()
def _report(shape: Shape, parameters: dict[str, Tensor], codes: Tensor, rows: Rows, device: torch.device) -> None:
    """Log the exact match of the last rows with their codes and with none, by number of operations."""
    ids = to_ids(rows.tokens[-4096:], device)
    programs = torch.as_tensor(rows.codes[-4096:]).to(device).long()
    sizes = (programs != NO_CODE).sum(1)
    ones = torch.ones(programs.shape, device=device)
    for label, used in (("with codes", programs), ("without", torch.full_like(programs, NO_CODE))):
        hidden = hidden_states(shape, parameters, _embed(parameters, ids, codes, used, ones))
        correct = response_loss(hidden, parameters["model.embed_tokens.weight"], ids)[1].all(-1)
        scores = [round(correct[sizes == size].float().mean().item(), 3) for size in range(4)]
        logger.info("exact match %s, by number of operations 0..3: %s", label, scores)
    lengths = [table.norm(dim=-1).mean() for table in (codes[:NO_CODE], parameters["model.embed_tokens.weight"])]
    logger.info("mean length of codes %.2f, of embeddings %.2f", *lengths)
