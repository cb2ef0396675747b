"""LoRAMoE: two groups of experts kept apart by a localised balance (arXiv:2312.09979)."""

from __future__ import annotations

from compose.routers.losses.localized import LocalizedCv2
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec
from compose.routers.target_patterns import FEED_FORWARD


@enter("loramoe")
def loramoe() -> Preset:
    """LoRAMoE (arXiv:2312.09979): soft mixture on the FFN's targets; half of the experts for each kind of task.

    A task's kind is its number, unless ``LocalizedCv2(task_groups=...)`` says otherwise.
    """
    spec = MixtureSpec(
        targets=FEED_FORWARD, losses=(LocalizedCv2(coefficient=0.1, delta=0.1),), train="both",
        departures=(
            "upstream's script has coefficient and delta of the balance at 0 (off); 0.1 and 0.1 are not published",
            "padding does not count in the balance",
        ),
    )  # fmt: skip
    return Preset(
        paper="2312.09979", summary="soft mixture on the FFN, two groups of experts in localised balance", spec=spec,
        experts=FreshExperts(num_experts=8, rank=4, alpha=32.0), needs=("tasks",),
    )  # fmt: skip
