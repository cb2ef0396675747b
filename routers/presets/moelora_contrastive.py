"""MoELoRA with a contrastive loss between experts (arXiv:2402.12851), and its successor's pairs (arXiv:2505.17553)."""

from __future__ import annotations

from compose.routers.losses.contrastive import Contrastive
from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("moelora_cl")
def moelora_cl() -> Preset:
    """MoELoRA (arXiv:2402.12851): top-2 experts per token, balanced, and told apart by InfoNCE on their outputs."""
    spec = MixtureSpec(
        select=TopK(k=2), renormalise="sum", train="both",
        losses=(SwitchLoadBalance(coefficient=0.01), Contrastive(coefficient=0.01, temperature=0.07)),
        departures=(
            "recalled, not verified: top-2 of 8 experts of rank 8, both coefficients 0.01, temperature 0.07",
            "pairs of the contrastive loss are read from the abstract; an even sample of decisions is compared",
        ),
    )  # fmt: skip
    return Preset(
        paper="2402.12851", summary="top-2 experts, balance and contrastive losses", spec=spec,
        experts=FreshExperts(num_experts=8, rank=8, alpha=16.0),
    )  # fmt: skip
