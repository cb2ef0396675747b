"""AdaMoLE: as many experts as pass a learned threshold (arXiv:2405.00361)."""

from __future__ import annotations

from compose.routers.losses.load_balance import ShiftedLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.threshold import Threshold
from compose.routers.spec import MixtureSpec
from compose.routers.target_patterns import ATTENTION


@enter("adamole")
def adamole() -> Preset:
    """AdaMoLE (arXiv:2405.00361): ``(p - tau(x))_+`` divided by its sum; tau is at most ``1 / E``; attention part."""
    spec = MixtureSpec(
        targets=ATTENTION, select=Threshold(), renormalise="sum", losses=(ShiftedLoadBalance(coefficient=1e-3),),
        train="both",
        departures=(
            "the balance loss is computed whatever requires gradients, and without padding",
            "recalled, not verified: alpha 64",
        ),
    )  # fmt: skip
    return Preset(
        paper="2405.00361", summary="experts above a learned threshold, attention part", spec=spec,
        experts=FreshExperts(num_experts=8, rank=32, alpha=64.0),
    )  # fmt: skip
