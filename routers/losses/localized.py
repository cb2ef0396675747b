"""LoRAMoE's localised balance: two kinds of experts for two kinds of rows (arXiv:2312.09979).

Shape letters: ``B`` rows, ``N`` decisions, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from compose.errors import IncompatibleError
from compose.routers.losses.means import counted, of_available, rows_of, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("localized_cv2")
@dataclass(frozen=True, kw_only=True)
class LocalizedCv2(AbstractLoss):
    """``var(Z) / mean(Z)²`` with ``Z_{b,e} = (1 ± δ) Σ_t g_{b,t,e}``: plus where expert and row are of one group.

    Optimum 0, where all ``Z`` are equal: experts of the row's own group then hold ``(1 - δ) / (1 + δ)`` of the mass of
    the others. That is what paper and code state; to favour matching experts, choose ``δ < 0``. The variance is the
    sample's, over all entries of all rows. Upstream's script has both coefficient and δ at 0, i.e. switches it off;
    0.1 and 0.1 here are no published values.

    Not copied: upstream sums over padding, and needs its own data loader for the groups. Experts that the site lacks
    and rows without a group are left out.

    Attributes:
        delta: In (-1, 1).
        denominator: ``"mean_squared"`` as the code, ``"mean"`` as the paper's formula.
        expert_groups: Group of every expert; empty: 1 for the first ``E // 2``, 0 for the rest, as upstream.
        task_groups: Group of every task number; empty: the task number is the group.
    """

    coefficient: float = 0.1
    delta: float = 0.1
    denominator: Literal["mean", "mean_squared"] = "mean_squared"
    expert_groups: tuple[int, ...] = ()
    task_groups: tuple[int, ...] = ()

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        problems = []
        if not -1 < self.delta < 1:
            problems.append(f"delta must lie in (-1, 1), got {self.delta}")
        if self.denominator not in ("mean", "mean_squared"):
            problems.append(f"denominator must be mean or mean_squared, got {self.denominator!r}")
        return problems

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        mass_BE, group_B = self._rows(decisions)
        matching = group_B[:, None] == self._expert_groups(decisions)[None]
        weighted = (mass_BE * torch.where(matching, 1 + self.delta, 1 - self.delta)).reshape(-1, 1)
        entries = ((group_B >= 0)[:, None] & decisions.available_E).reshape(-1)
        mean, number = world_mean(weighted, entries, world_sum)
        spread, _ = world_mean((weighted - mean.detach()) ** 2, entries, world_sum)
        variance = spread * number / torch.where(number > 1, number - 1, 1)
        below = mean if self.denominator == "mean" else mean**2
        return (variance / torch.where(below != 0, below, 1)).squeeze(0)

    def _rows(self, decisions: Decisions) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass ``(B, E)`` and group ``(B,)`` of rows; -1 for rows without counted decisions or without a group."""
        mask_N, rows_N = counted(decisions, self.over), rows_of(decisions)
        rows = int(rows_N.max()) + 1 if len(rows_N) else 0
        gates_NE = torch.where(mask_N[:, None], of_available(decisions.gates_NE, decisions), 0)
        mass_BE = gates_NE.new_zeros(rows, gates_NE.shape[1]).index_add(0, rows_N, gates_NE)
        groups_N = torch.where(mask_N, self._task_groups(decisions), -1)
        return mass_BE, torch.full_like(groups_N[:1].expand(rows), -1).scatter_reduce(0, rows_N, groups_N, "amax")

    def _task_groups(self, decisions: Decisions) -> torch.Tensor:
        tasks_N = decisions.tasks_N
        if not self.task_groups:
            return tasks_N
        if len(tasks_N) and int(tasks_N.max()) >= len(self.task_groups):
            raise IncompatibleError(
                f"localized_cv2 has groups for {len(self.task_groups)} tasks; task {int(tasks_N.max())} has none"
            )
        groups = torch.tensor(self.task_groups, device=tasks_N.device)
        return torch.where(tasks_N < 0, -1, groups[tasks_N.clamp(min=0)])

    def _expert_groups(self, decisions: Decisions) -> torch.Tensor:
        experts = decisions.gates_NE.shape[1]
        if self.expert_groups and len(self.expert_groups) != experts:
            raise IncompatibleError(
                f"localized_cv2 has groups for {len(self.expert_groups)} experts; the bank has {experts}"
            )
        default = [1] * (experts // 2) + [0] * (experts - experts // 2)
        return torch.tensor(self.expert_groups or default, device=decisions.gates_NE.device)
