"""Pooling of hidden states over the tokens a gate may read.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

import torch


def pool(how: str, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return ``(B, D)`` float32: the mean of the masked-in tokens, or the last of them.

    Args:
        how: ``"mean"`` or ``"last"``.
        hidden_BTD: Any float dtype.
        mask_BT: bool; at least one True per row.
    """
    if how == "last":
        places = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        last_B = torch.where(mask_BT, places, -1).amax(1)
        return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B].float()
    weights = mask_BT.float()
    total = torch.einsum("btd,bt->bd", hidden_BTD.float(), weights)
    return total / weights.sum(1, keepdim=True).clamp_min(1.0)
