"""MoLA: more experts in higher layers (arXiv:2402.08562)."""

from __future__ import annotations

from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("mola")
def mola() -> Preset:
    """MoLA (arXiv:2402.08562) with 2, 4, 6 and 8 experts in the four quarters of the depth, top-2 everywhere.

    Other shapes: ``FreshExperts(num_experts=(8, 6, 4, 2), ...)``; ``k`` per quarter: ``select=TopK(k=(1, 1, 2, 2))``.
    """
    spec = MixtureSpec(
        select=TopK(k=2), renormalise="sum", losses=(SwitchLoadBalance(coefficient=1e-3),), train="both",
        departures=(
            "the authors' code has the balance loss off for single tasks and on for instruction tuning; here it is on",
            "the balance loss is the mean over targets, not a sum over layers of pooled targets",
            "no dropout on the experts' inputs (0.05 upstream)",
        ),
    )  # fmt: skip
    return Preset(
        paper="2402.08562", summary="top-2 of 2, 4, 6 and 8 experts by depth", spec=spec,
        experts=FreshExperts(num_experts=(2, 4, 6, 8), rank=8, alpha=16.0),
    )  # fmt: skip
