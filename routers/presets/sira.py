"""SiRA: sparse mixture with capacity and expert dropout (arXiv:2311.09179)."""

from __future__ import annotations

from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("sira")
def sira() -> Preset:
    """SiRA (arXiv:2311.09179): top-k experts that keep their tokens of highest gate, and dropout of whole experts."""
    spec = MixtureSpec(
        select=TopK(k=4), renormalise="sum", capacity=1.0, expert_dropout=0.5,
        losses=(SwitchLoadBalance(coefficient=1e-2),), train="both",
        departures=(
            "capacity and expert dropout apply in training only: at evaluation they would let tokens see later ones",
            "recalled, not verified: top-4 of 16 experts of rank 4, dropout 0.5, coefficient 1e-2, capacity factor 1",
        ),
    )  # fmt: skip
    return Preset(
        paper="2311.09179", summary="top-4 of 16 experts with capacity and expert dropout", spec=spec,
        experts=FreshExperts(num_experts=16, rank=4, alpha=8.0),
    )  # fmt: skip
