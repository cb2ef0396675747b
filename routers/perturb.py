"""What disturbs gates in training only: noise on scores, expert dropout, capacity. Callers apply none of it at eval.

Without a generator numbers come from torch's global state of the device, as those of ``nn.Dropout`` do: checkpointed
layers then draw the same when they are computed again. Shape letters: ``N`` decisions, ``E`` experts, ``K`` chosen.
"""

from __future__ import annotations

import torch


def add_noise(logits: torch.Tensor, std: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Add Gaussian noise to scores; ``-inf`` (a missing expert) stays.

    Args:
        logits: ``(..., E)``.
        std: Standard deviation; 0 draws nothing.
        generator: On the scores' device.
    """
    if std == 0:
        return logits
    return logits + std * torch.randn(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)


def drop_experts(logits: torch.Tensor, probability: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Mask experts of each decision independently with ``-inf`` (SiRA's expert dropout, arXiv:2311.09179).

    At least one available expert of a decision stays: where the draw would take all, the one that was furthest from
    being dropped, so each is equally likely. Nothing is rescaled: normalisation follows.

    Args:
        logits: ``(..., E)``, ``-inf`` for missing experts.
        probability: In [0, 1); 0 draws nothing.
        generator: On the scores' device.
    """
    if probability == 0:
        return logits
    draws = torch.rand(logits.shape, generator=generator, device=logits.device)
    luck = draws.masked_fill(logits == float("-inf"), -1)
    best = torch.zeros_like(luck, dtype=torch.bool).scatter(-1, luck.argmax(-1, keepdim=True), True)
    return logits.masked_fill((draws < probability) & ~best, float("-inf"))


def limit_capacity(
    gates: torch.Tensor,
    expert_ids: torch.Tensor | None,
    num_experts: int,
    factor: float,
    real: torch.Tensor | None = None,
    *,
    available: int | None = None,
) -> torch.Tensor:
    """Let each expert keep its ``C`` decisions of highest gate; others lose it (SiRA, arXiv:2311.09179).

    ``C = ceil(factor * assignments / E)``: assignments are the real decisions' gates that are not 0, so ``factor = 1``
    is an even share. Equal gates are kept in the order of decisions. Padding takes no place and keeps its gates.
    Decisions of the whole batch compete, so this is not causal: for training only.

    Args:
        gates: ``(..., E)``, or ``(..., K)`` with ids.
        expert_ids: int64 ``(..., K)``, negative for none; None: gates of all experts.
        num_experts: ``E``.
        factor: Positive.
        real: bool ``(...)``: False for padding; None: all are real.
        available: Experts that share the assignments; default ``num_experts``.

    Returns:
        Gates in the given shape, 0 where an expert was full.
    """
    flat = gates.reshape(-1, gates.shape[-1])
    wide_NE = flat.detach()
    if expert_ids is not None:
        places = expert_ids.reshape(flat.shape)
        places = torch.where(places < 0, num_experts, places)
        wide_NE = wide_NE.new_zeros(flat.shape[0], num_experts + 1).scatter(1, places, wide_NE)
        wide_NE[:, num_experts] = 0
    taken_NE = wide_NE != 0
    if real is not None:
        taken_NE = taken_NE & real.reshape(-1, 1).to(taken_NE.device)
    order_NE = torch.sort(wide_NE.masked_fill(~taken_NE, float("-inf")), dim=0, descending=True, stable=True).indices
    lines_NE = torch.arange(flat.shape[0], device=flat.device)[:, None].expand_as(order_NE)
    rank_NE = torch.empty_like(order_NE).scatter(0, order_NE, lines_NE)
    capacity = torch.ceil(taken_NE.sum() * factor / (available or num_experts))
    full_NE = taken_NE & (rank_NE >= capacity)
    full = full_NE if expert_ids is None else full_NE.gather(1, places)
    return flat.masked_fill(full, 0).reshape(gates.shape)
