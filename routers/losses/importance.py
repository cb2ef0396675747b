"""Balance of the mass that gates give to experts: the squared coefficient of variation, and MoLE's log product.

Shape letters: ``N`` decisions, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compose.routers.losses.means import counted, number_available, of_available, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("importance_cv2")
@dataclass(frozen=True, kw_only=True)
class ImportanceCv2(AbstractLoss):
    """``var(G) / mean(G)²`` of the importance ``G_i = Σ_n g_i`` over experts (Shazeer et al., arXiv:1701.06538).

    Optimum 0 (equal mass); ``E - 1`` where one expert takes all. The variance is the population's, as in the paper's
    code. Default of the paper: 0.1.
    """

    coefficient: float = 0.1

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        gates_NE = of_available(decisions.gates_NE, decisions)
        mass_E, _ = world_mean(gates_NE, counted(decisions, self.over), world_sum)
        experts = max(1, number_available(decisions))
        mean = mass_E.sum() / experts
        variance = torch.where(decisions.available_E, (mass_E - mean) ** 2, 0).sum() / experts
        return variance / torch.where(mean != 0, mean**2, 1)


@LOSSES.register("mole_balance")
@dataclass(frozen=True, kw_only=True)
class MoleBalance(AbstractLoss):
    """``-Σ_i log q_i`` of the mean probability ``q_i`` (MoLE, arXiv:2404.13628: ``-log Π q_i``).

    Optimum ``E log E`` (uniform). The paper's coefficient is 0.5, as recalled and not checked. Departure: the paper
    averages one input's gates over blocks; here ``q`` is the mean over one site's decisions. Probabilities are taken
    before selection, and below ``1e-9`` count as ``1e-9``, so that the value stays finite for a dead expert.
    """

    coefficient: float = 0.5

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        probs_NE = of_available(decisions.probs_NE, decisions)
        mean_E, total = world_mean(probs_NE, counted(decisions, self.over), world_sum)
        logs_E = torch.where(decisions.available_E, mean_E.clamp(min=1e-9).log(), 0)
        return torch.where(total > 0, -logs_E.sum(), 0 * mean_E.sum())
