"""MoE-LoRA with gradients of experts scaled by the gate's root (arXiv:2502.15828)."""

from __future__ import annotations

from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("moe_riemann")
def moe_riemann() -> Preset:
    """Value ``g E(x)``, but the experts' gradient carries ``sqrt(g)`` in place of ``g`` (arXiv:2502.15828)."""
    spec = MixtureSpec(
        select=TopK(k=10), renormalise="sum", expert_grad="sqrt_gate", train="both",
        departures=(
            "the Riemannian preconditioner of A and B is the optimiser's business and not part of the mixture",
            "recalled, not verified: top-10 of 20 experts of rank 4",
            "experts start from different A; upstream copies one",
        ),
    )  # fmt: skip
    return Preset(
        paper="2502.15828", summary="top-k experts with gradients scaled by the gate's root", spec=spec,
        experts=FreshExperts(num_experts=20, rank=4, alpha=8.0),
    )  # fmt: skip
