"""The router z-loss: keeps scores small (ST-MoE, arXiv:2202.08906)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compose.routers.losses.means import at_least_float32, counted, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("z")
@dataclass(frozen=True, kw_only=True)
class ZLoss(AbstractLoss):
    """``mean logsumexp(logits)²`` over available experts.

    Optimum 0. Default of the paper: 1e-3. Not copied: LD-MoLE's code counts padding.
    """

    coefficient: float = 1e-3

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        mask_N = counted(decisions, self.over) & decisions.available_E.any()
        logits_NE = at_least_float32(decisions.logits_NE).masked_fill(~decisions.available_E, float("-inf"))
        level_N = torch.logsumexp(torch.where(mask_N[:, None], logits_NE, 0), 1)
        mean, _ = world_mean(level_N[:, None] ** 2, mask_N, world_sum)
        return mean.squeeze(0)
