"""Entropies of gates as losses: sharpness, mutual information, GJS divergence, Tsallis entropy.

All read probabilities before selection. Shape letters: ``N`` decisions, ``E`` experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compose.routers.entropy import shannon, tsallis, tsallis_maximum
from compose.routers.losses.means import counted, number_available, of_available, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(AbstractLoss):
    """``sign · mean H(p)`` in nats.

    Optimum with ``sign = 1``: 0 (each decision certain); with -1: ``-log E`` (each decision uniform).

    Attributes:
        sign: 1 sharpens, -1 flattens.
    """

    sign: int = 1

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        return [] if self.sign in (1, -1) else [f"sign must be 1 or -1, got {self.sign}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        entropy_N = shannon(of_available(decisions.probs_NE, decisions))
        mean, _ = world_mean(entropy_N[:, None], counted(decisions, self.over), world_sum)
        return self.sign * mean.squeeze(0)


@LOSSES.register("mi")
@dataclass(frozen=True, kw_only=True)
class MutualInformation(AbstractLoss):
    """``mean H(p) - H(mean p)``: minus the mutual information of decision and expert (mttl's ``moe_ent_reg``).

    Optimum ``-log E``: each decision certain, all experts used equally.
    """

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        probs_NE = of_available(decisions.probs_NE, decisions)
        columns = torch.cat([shannon(probs_NE)[:, None], probs_NE], 1)
        means, _ = world_mean(columns, counted(decisions, self.over), world_sum)
        return means[0] - shannon(means[1:])


@LOSSES.register("gjs")
@dataclass(frozen=True, kw_only=True)
class GeneralisedJensenShannon(AbstractLoss):
    """HMoRA's divergence hinge (its code; ICLR 2025).

    ``relu((b - c) log E - (min(H(mean p), b log E) - mean max(H(p), c log E))) / log E``
    with the two gammas as ``b`` and ``c``.

    Optimum 0; at most ``b - c``. Defaults: gammas as in its code; coefficient 0.005 as the survey in use here gives it
    (the code's default is 0.01). Not copied: ``1e-9`` inside the logarithm.

    Attributes:
        gamma_balance: Share of ``log E`` beyond which the entropy of the mean is not raised; in (0, 1].
        gamma_certain: Share of ``log E`` below which the entropy of a decision is not lowered; in [0, gamma_balance).
    """

    coefficient: float = 0.005
    gamma_balance: float = 1.0
    gamma_certain: float = 0.0

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        if 0 <= self.gamma_certain < self.gamma_balance <= 1:
            return []
        return [f"0 <= gamma_certain < gamma_balance <= 1 is needed, got {self.gamma_certain}, {self.gamma_balance}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        most = math.log(max(1, number_available(decisions)))
        highest, lowest = self.gamma_balance * most, self.gamma_certain * most
        probs_NE = of_available(decisions.probs_NE, decisions)
        columns = torch.cat([shannon(probs_NE).clamp(min=lowest)[:, None], probs_NE], 1)
        means, total = world_mean(columns, counted(decisions, self.over), world_sum)
        divergence = shannon(means[1:]).clamp(max=highest) - means[0]
        hinge = torch.relu(highest - lowest - divergence) / (most or 1.0)
        return torch.where(total > 0, hinge, 0 * hinge)


@LOSSES.register("tsallis")
@dataclass(frozen=True, kw_only=True)
class Tsallis(AbstractLoss):
    """Mean Tsallis entropy of decisions as a share of its maximum (DynMoLE's code): 0 certain, 1 uniform.

    Optimum 0. Defaults of DynMoLE's code: q = 1.1, coefficient 1e-2. Not copied: padding counts there, and ``1e-5`` is
    added to probabilities, which pushes the share of a uniform decision above 1.

    Attributes:
        q: Entropic index, positive; 1 is Shannon's entropy.
    """

    q: float = 1.1

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        return [] if self.q > 0 else [f"q must be positive, got {self.q}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        most = tsallis_maximum(number_available(decisions), self.q)
        entropy_N = tsallis(of_available(decisions.probs_NE, decisions), self.q)
        mean, _ = world_mean(entropy_N[:, None], counted(decisions, self.over), world_sum)
        return mean.squeeze(0) / most if most else 0 * mean.squeeze(0)
