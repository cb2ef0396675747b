"""MoRAL: LoRA experts on the FFN for lifelong learning (arXiv:2402.11260)."""

from __future__ import annotations

from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec
from compose.routers.target_patterns import FEED_FORWARD

_EXPERTS = FreshExperts(num_experts=8, rank=8, alpha=16.0)
_RECALLED = "recalled, not verified: 8 experts of rank 8"


@enter("moral")
def moral() -> Preset:
    """MoRAL (arXiv:2402.11260) as the survey describes it: a soft mixture on the FFN's targets."""
    spec = MixtureSpec(targets=FEED_FORWARD, train="both", departures=(_RECALLED,))
    return Preset(paper="2402.11260", summary="soft mixture on the FFN", spec=spec, experts=_EXPERTS)


@enter("moral_top2")
def moral_top2() -> Preset:
    """MoRAL (arXiv:2402.11260) with top-k gates, as a second description of it has them."""
    spec = MixtureSpec(
        targets=FEED_FORWARD, select=TopK(k=2), renormalise="sum", train="both",
        departures=(_RECALLED, "recalled, not verified: k = 2"),
    )  # fmt: skip
    return Preset(paper="2402.11260", summary="top-2 mixture on the FFN", spec=spec, experts=_EXPERTS)
