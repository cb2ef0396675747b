"""Contrastive losses on experts' outputs, in rank space.

Shape letters: ``N`` decisions, ``S`` sampled decisions, ``E`` experts, ``R`` rank rows, ``M`` items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from compose.kernels.stack import LoraStack
from compose.routers.losses.means import chosen, counted
from compose.routers.losses.rank_space import activations, cosines, gram, inputs_of, owners, sample
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("contrastive")
@dataclass(frozen=True, kw_only=True)
class Contrastive(AbstractLoss):
    """InfoNCE over cosines of expert outputs: ``-log e^{s⁺/τ} / (e^{s⁺/τ} + Σ e^{s⁻/τ})``, mean over positives.

    ``"same_other"`` (MoELoRA, arXiv:2402.12851): items are outputs of chosen experts; positives come from the same
    expert on other tokens, negatives from other experts. ``"active_inactive"`` (CoMoE, arXiv:2505.17553): anchors and
    positives are outputs of a token's chosen experts, negatives those of its other experts.

    Infimum 0 (positives alike, negatives far). 0 where no anchor has both positives and negatives, as with k = 1 in
    ``"active_inactive"``. Outputs that are zero (``B = 0`` at the start of training) have cosine 0 with everything and
    pass no gradient. τ = 0.07 as recalled from the first paper; coefficients of the papers are not known here.

    Departures: both papers are known by their abstracts, so which pairs are formed is our reading; items are an even,
    deterministic sample of the decisions of this process, others are not looked at.

    Attributes:
        mode: See above.
        temperature: τ.
        items: At most this many items (``"same_other"``) or tokens (``"active_inactive"``) are compared.
    """

    needs_inputs: ClassVar[bool] = True

    mode: Literal["same_other", "active_inactive"] = "same_other"
    temperature: float = 0.07
    items: int = 256

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        problems = []
        if self.mode not in ("same_other", "active_inactive"):
            problems.append(f"mode must be same_other or active_inactive, got {self.mode!r}")
        if not self.temperature > 0:
            problems.append(f"temperature must be positive, got {self.temperature}")
        if self.items < 2:
            problems.append(f"items must be at least 2, got {self.items}")
        return problems

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site; ``world_sum`` is not used."""
        x_ND, stack = inputs_of(decisions, "contrastive")
        lines_S = sample(counted(decisions, self.over), self.items)
        h_SR = activations(x_ND[lines_S], stack)
        present_E = decisions.available_E & stack.present()
        active_SE = chosen(decisions)[lines_S] & present_E
        if self.mode == "same_other":
            return info_nce(*_same_other(h_SR, stack, active_SE, self.items), self.temperature)
        return info_nce(*_active_inactive(h_SR, stack, active_SE, present_E), self.temperature)


def info_nce(cosine: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE of anchors (second to last dimension) against items (last).

    Args:
        cosine: ``(..., M, M)``.
        positive: bool, likewise.
        negative: bool, likewise.
        temperature: Positive.

    Returns:
        Mean over anchors with both kinds of their mean over positives; 0 where there are none.
    """
    scores = cosine / temperature
    anchors = positive.any(-1) & negative.any(-1)
    against = torch.where(negative, scores, float("-inf")).where(anchors[..., None], torch.zeros_like(scores))
    costs = torch.nn.functional.softplus(torch.logsumexp(against, -1, keepdim=True) - scores)
    per_anchor = torch.where(positive, costs, 0).sum(-1) / positive.sum(-1).clamp(min=1)
    return torch.where(anchors, per_anchor, 0).sum() / anchors.sum().clamp(min=1)


def _same_other(
    h_SR: torch.Tensor, stack: LoraStack, active_SE: torch.Tensor, items: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines ``(M, M)`` between (token, chosen expert) items, and which pairs are positive and negative."""
    places_M = sample(active_SE.reshape(-1), items)
    token_M, expert_M = places_M // active_SE.shape[1], places_M % active_SE.shape[1]
    items_MR = h_SR[token_M] * owners(stack, h_SR.dtype)[expert_M]
    cosine = cosines(items_MR @ gram(stack.b_RO).to(h_SR.dtype) @ items_MR.T)
    same = expert_M[:, None] == expert_M[None]
    return cosine, same & (token_M[:, None] != token_M[None]), ~same


def _active_inactive(
    h_SR: torch.Tensor, stack: LoraStack, active_SE: torch.Tensor, present_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cosines ``(S, E, E)`` between the experts of each token, and which pairs are positive and negative."""
    owner_ER = owners(stack, h_SR.dtype)
    items_SER = h_SR[:, None] * owner_ER
    dots = ((items_SER @ gram(stack.b_RO).to(h_SR.dtype)) * h_SR[:, None]) @ owner_ER.T
    itself = torch.eye(active_SE.shape[1], dtype=torch.bool, device=h_SR.device)
    anchors = active_SE[:, :, None]
    return cosines(dots), anchors & active_SE[:, None] & ~itself, anchors & (present_E & ~active_SE)[:, None]
