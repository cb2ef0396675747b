"""SMoRA: every rank is an expert (arXiv:2501.15103)."""

from __future__ import annotations

from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("smora")
def smora() -> Preset:
    """SMoRA (arXiv:2501.15103): one LoRA of rank 64 whose ranks are gated one by one, ``B diag(g) A x``, top-8.

    Ranks are chosen by probability plus a bias that evens out their load without a loss: call
    `compose.routers.balance` after each optimiser step.
    """
    spec = MixtureSpec(
        select=TopK(k=8, selection_bias=True), train="both",
        departures=(
            "a secondary source was read: gates are the chosen ranks' probabilities, not renormalised",
            "recalled, not verified: 8 of 64 ranks, scaling 2",
        ),
    )  # fmt: skip
    return Preset(
        paper="2501.15103", summary="one LoRA whose ranks are experts, top-8 of 64", spec=spec,
        experts=FreshExperts(num_experts=64, rank=1, alpha=2.0),
    )  # fmt: skip
