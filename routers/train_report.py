"""What a training step tells: losses, entropy and load of the gates, rates.

Shape letters: ``N`` decisions, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compose.routers.entropy import shannon
from compose.routers.losses.means import chosen
from compose.routers.processes import sum_
from compose.routers.routing import Decisions


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step of a run.

    Attributes:
        step: Steps done, from 1.
        total: Of the run.
        stage: Name of its stage.
        loss: The model's loss per predicted token, over the whole step.
        aux_loss: Weighted sum of the auxiliary losses, mean over micro-batches.
        aux: Auxiliary losses by name, before their coefficients.
        entropy: Mean over sites of the mean entropy of a decision, nats; None without gates that decide.
        load: Mean over sites of the share of (decision, slot) assignments, per expert; empty likewise.
        rates: Learning rates of router and experts.
        gradient_norm: Before clipping.
        tokens: Predicted tokens.
        tasks: Task -> records, in all steps so far of the stage.
        seconds: Since the run began or was continued.
    """

    step: int
    total: int
    stage: str
    loss: float
    aux_loss: float
    aux: dict[str, float]
    entropy: float | None
    load: tuple[float, ...]
    rates: tuple[float, float]
    gradient_norm: float
    tokens: int
    tasks: dict[str, int]
    seconds: float

    def entry(self) -> dict[str, Any]:
        """The history's entry: what is the same however often a run was interrupted (all but ``seconds``)."""
        plain = {name: value for name, value in vars(self).items() if name not in ("seconds", "total")}
        return {**plain, "load": list(self.load), "rates": list(self.rates)}


@dataclass
class GateSums:
    """Entropy and load of the real decisions of a step, site by site."""

    sites: dict[str, torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, decisions: Sequence[Decisions]) -> None:
        """Count the decisions of one forward."""
        for each in decisions:
            real_N = each.real_N
            entropies_N = torch.where(real_N, shannon(each.probs_NE.double().clamp_min(0)), 0)
            load_E = (chosen(each) & real_N[:, None]).sum(0).double()
            sums = torch.cat([torch.stack([entropies_N.sum(), real_N.sum().double()]), load_E])
            self.sites[each.site] = self.sites[each.site] + sums if each.site in self.sites else sums

    def finish(self) -> tuple[float | None, tuple[float, ...]]:
        """Entropy and load over all processes; see `StepReport`."""
        if not self.sites:
            return None, ()
        sums = torch.stack([self.sites[site] for site in sorted(self.sites)])
        sum_([sums])
        counted = sums[sums[:, 1] > 0]
        if not len(counted):
            return None, ()
        load = counted[:, 2:] / counted[:, 2:].sum(1, keepdim=True).clamp_min(1)
        return float((counted[:, 0] / counted[:, 1]).mean()), tuple(load.mean(0).tolist())
