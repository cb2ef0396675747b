"""Entropies of gate probabilities, with finite gradients where a probability is 0.

Shape letters: ``E`` experts.
"""

from __future__ import annotations

import math

import torch


def shannon(probs: torch.Tensor) -> torch.Tensor:
    """``-Σ p log p`` over the last dimension, in nats; 0 log 0 = 0, with gradient 0."""
    safe = torch.where(probs > 0, probs, 1)
    return -(probs * safe.log()).sum(-1)


def tsallis(probs: torch.Tensor, q: float) -> torch.Tensor:
    """``(1 - Σ p^q) / (q - 1)`` over the last dimension; Shannon's entropy at ``q = 1``."""
    if q == 1:
        return shannon(probs)
    powers = torch.where(probs > 0, torch.where(probs > 0, probs, 1) ** q, 0)
    return (1 - powers.sum(-1)) / (q - 1)


def tsallis_maximum(experts: int, q: float) -> float:
    """The entropy of ``experts`` equal probabilities; 0 for fewer than two."""
    if experts < 2:
        return 0.0
    return math.log(experts) if q == 1 else (1 - experts ** (1 - q)) / (q - 1)
