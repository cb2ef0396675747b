"""LLaVA-MoLE: one expert per token on the FFN (arXiv:2401.16160)."""

from __future__ import annotations

from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.argmax import Argmax
from compose.routers.spec import MixtureSpec
from compose.routers.target_patterns import FEED_FORWARD


@enter("llava_mole")
def llava_mole() -> Preset:
    """LLaVA-MoLE (arXiv:2401.16160): the expert of highest score per token, with Switch's load balance."""
    spec = MixtureSpec(
        targets=FEED_FORWARD, select=Argmax(), losses=(SwitchLoadBalance(coefficient=1e-2),), train="both",
        departures=(
            "recalled, not verified: 3 experts of rank 32, coefficient 1e-2",
            "the chosen expert is weighted by its probability, so that gates learn from the model's loss too",
        ),
    )  # fmt: skip
    return Preset(
        paper="2401.16160", summary="top-1 expert per token on the FFN", spec=spec,
        experts=FreshExperts(num_experts=3, rank=32, alpha=64.0),
    )  # fmt: skip
