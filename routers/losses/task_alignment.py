"""Align-LoRA: draw the tasks' activations ``A x`` together (arXiv:2508.05078).

Shape letters: ``N`` decisions, ``S`` sampled decisions, ``R`` rank rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch

from compose.routers.losses.means import at_least_float32, counted
from compose.routers.losses.rank_space import inputs_of, sample
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions

BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)


@LOSSES.register("mmd_align")
@dataclass(frozen=True, kw_only=True)
class MmdAlign(AbstractLoss):
    """Squared maximum mean discrepancy of ``A x`` between tasks, mean over pairs of tasks.

    ``mean k(x, x') + mean k(y, y') - 2 mean k(x, y)``, ``k = Σ exp(-|x - y|² / (2 bandwidth))``, the sample itself
    included in its mean as upstream. Optimum 0 (equal samples); at most twice the number of bandwidths. 0 with fewer
    than two tasks in the batch: the paper samples an equal number of rows per task. Default of its script: 0.2.

    Departures: upstream compares equal positions of padded rows and counts padding; here the decisions of a task are
    one set, of which an even, deterministic sample of this process is compared. Ranks of all available experts at the
    site count as one vector (upstream has one adapter).

    Attributes:
        bandwidths: Of the kernels that are added up; variances, as in the paper's code.
        tokens: At most this many decisions per task.
    """

    needs_inputs: ClassVar[bool] = True

    coefficient: float = 0.2
    bandwidths: tuple[float, ...] = BANDWIDTHS
    tokens: int = 64

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        problems = [] if self.tokens >= 1 else [f"tokens must be at least 1, got {self.tokens}"]
        if not self.bandwidths or min(self.bandwidths) <= 0:
            problems.append(f"bandwidths must be positive, got {self.bandwidths}")
        return problems

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site; ``world_sum`` is not used."""

        def kernel(left_SR: torch.Tensor, right_SR: torch.Tensor) -> torch.Tensor:
            squares = ((left_SR[:, None] - right_SR[None]) ** 2).sum(-1)
            return sum((torch.exp(squares / (-2 * sigma)).mean() for sigma in self.bandwidths), squares.new_zeros(()))

        def discrepancy(left_SR: torch.Tensor, right_SR: torch.Tensor) -> torch.Tensor:
            return kernel(left_SR, left_SR) + kernel(right_SR, right_SR) - 2 * kernel(left_SR, right_SR)

        return _over_pairs(decisions, counted(decisions, self.over), "mmd_align", self.tokens, 1, discrepancy)


@LOSSES.register("kl_align")
@dataclass(frozen=True, kw_only=True)
class KlAlign(AbstractLoss):
    """Symmetric KL divergence of diagonal Gaussians fitted to ``A x`` of two tasks, mean over pairs of tasks.

    ``(KL(p | q) + KL(q | p)) / 2``, summed over rank rows; sample variances plus ``epsilon``. Optimum 0. Tasks with
    fewer than two decisions have no variance and are left out. Default of the paper's script: 0.2; ``epsilon`` 1e-8.
    Departures as in `mmd_align`, with all decisions of this process.

    Attributes:
        epsilon: Added to variances.
    """

    needs_inputs: ClassVar[bool] = True

    coefficient: float = 0.2
    epsilon: float = 1e-8

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        return [] if self.epsilon > 0 else [f"epsilon must be positive, got {self.epsilon}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site; ``world_sum`` is not used."""

        def divergence(left_SR: torch.Tensor, right_SR: torch.Tensor) -> torch.Tensor:
            left_R, right_R = left_SR.var(0) + self.epsilon, right_SR.var(0) + self.epsilon
            apart_R = (left_SR.mean(0) - right_SR.mean(0)) ** 2
            ratio_R = (left_R + apart_R) / right_R + (right_R + apart_R) / left_R
            return ((ratio_R - 2) / 4).sum()

        return _over_pairs(decisions, counted(decisions, self.over), "kl_align", None, 2, divergence)


def _over_pairs(
    decisions: Decisions,
    mask_N: torch.Tensor,
    loss: str,
    tokens: int | None,
    least: int,
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Mean distance of ``A x`` over pairs of tasks that have at least ``least`` decisions."""
    x_ND, stack = inputs_of(decisions, loss)
    a_RD = at_least_float32(stack.a_RD)[decisions.available_E[stack.index.adapter_R]]
    samples = []
    for task in decisions.tasks_N[mask_N & (decisions.tasks_N >= 0)].unique().tolist():
        of_task = mask_N & (decisions.tasks_N == task)
        lines_S = sample(of_task, len(of_task) if tokens is None else tokens)
        if len(lines_S) >= least and len(a_RD):
            samples.append(at_least_float32(x_ND[lines_S]) @ a_RD.T)
    distances = [distance(left, right) for left, right in combinations(samples, 2)]
    if not distances:
        return 0 * (a_RD.sum() + torch.where(mask_N[:, None], at_least_float32(x_ND), 0).sum())
    return torch.stack(distances).mean()
