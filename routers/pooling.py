"""Pooling of hidden states over the tokens a gate may read.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import Literal

import torch

Pooling = Literal["none", "mean", "last", "mean_std"]
_SMALLEST = 1e-12
"""Added to a variance, so that its root has a gradient where all tokens are alike."""


def pooled_width(how: str, width: int) -> int:
    """Width of the vector that `pool` makes of hidden states of ``width``."""
    return 2 * width if how == "mean_std" else width


def pool(how: str, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return ``(B, pooled_width)`` float32: one vector for the masked-in tokens.

    Args:
        how: ``"mean"``; ``"last"``, the last of them; ``"mean_std"``, statistics pooling: mean and standard deviation
            over tokens side by side (x-vectors, Snyder et al. 2018), each layer-normalised without a scale, because
            the first is several times the second.
        hidden_BTD: Any float dtype.
        mask_BT: bool; at least one True per row.
    """
    if how == "last":
        places = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        last_B = torch.where(mask_BT, places, -1).amax(1)
        return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B].float()
    weights = mask_BT.float()
    count = weights.sum(1, keepdim=True).clamp_min(1.0)
    mean = torch.einsum("btd,bt->bd", hidden_BTD.float(), weights) / count
    if how == "mean":
        return mean
    spread = (hidden_BTD.float() - mean.unsqueeze(1)).square()
    std = (torch.einsum("btd,bt->bd", spread, weights) / count + _SMALLEST).sqrt()
    return torch.cat([torch.nn.functional.layer_norm(half, half.shape[-1:]) for half in (mean, std)], 1)
