"""LD-MoLE's sparsity objective: keep λ where at most k experts are active (arXiv:2509.25684).

Shape letters: ``N`` decisions, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compose.errors import IncompatibleError
from compose.routers.losses.means import at_least_float32, counted, number_available, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("sparsity_interval")
@dataclass(frozen=True, kw_only=True)
class SparsityInterval(AbstractLoss):
    """``mean relu(lower_k - λ)`` with ``lower_k = 1 - Σ_{j<=k} (u_(j) - u_(k+1))`` of the sorted scores ``u``.

    Sparsegen keeps at most k experts exactly where ``λ >= lower_k``, so the optimum 0 means "k or fewer". Scores carry
    no gradient here; λ does. 0 where the site has no more than k experts. Reads ``extras["lambda"]``. Code's k: 2. Its
    coefficient is set per run and 0 by default; 0.01 is no published value. Not copied: padding counts there.

    Attributes:
        k: How many experts may be active.

    Raises:
        IncompatibleError: On call: the normalisation gives no λ.
    """

    k: int = 2

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        return [] if self.k >= 1 else [f"k must be at least 1, got {self.k}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        if "lambda" not in decisions.extras:
            raise IncompatibleError(
                f"sparsity_interval at {decisions.site} reads λ per decision; use the normalisation 'sparsegen'"
            )
        mask_N = counted(decisions, self.over)
        lambda_N = at_least_float32(decisions.extras["lambda"]).reshape(-1).expand(mask_N.shape)
        experts = number_available(decisions)
        logits_NE = at_least_float32(decisions.logits_NE.detach())[:, decisions.available_E]
        if self.k >= experts:
            gap_N = 0 * lambda_N
        else:
            highest = torch.sort(logits_NE, dim=1, descending=True).values[:, : self.k + 1]
            lower_N = 1 - (highest[:, : self.k] - highest[:, self.k :]).sum(1)
            gap_N = torch.relu(lower_N - lambda_N)
        mean, _ = world_mean(gap_N[:, None], mask_N, world_sum)
        return mean.squeeze(0)
