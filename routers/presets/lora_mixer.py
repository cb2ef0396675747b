"""LoRA-Mixer: experts on the attention projections (arXiv:2507.00029), provisional."""

from __future__ import annotations

from compose.routers.losses.entropies import Entropy
from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.hard_soft_top_k import HardSoftTopK
from compose.routers.spec import MixtureSpec
from compose.routers.target_patterns import ATTENTION


@enter("lora_mixer")
def lora_mixer() -> Preset:
    """LoRA-Mixer, as far as its abstract tells: top-k gates on the attention part, balance plus entropy as loss.

    Only the abstract was read and no code is public. Its hard-soft routing is taken as a straight-through
    estimator: the values of top-k, the gradients of the soft mixture.
    """
    spec = MixtureSpec(
        targets=ATTENTION, select=HardSoftTopK(k=2), renormalise="sum", train="both",
        losses=(SwitchLoadBalance(coefficient=1e-2), Entropy(coefficient=1e-3, sign=1)),
        departures=(
            "provisional: known by its abstract; hard-soft routing is read as a straight-through top-2",
            "not published: 8 experts of rank 8, coefficients 1e-2 (balance) and 1e-3 (entropy)",
        ),
    )  # fmt: skip
    return Preset(
        paper="2507.00029", summary="provisional: top-2 gates on the attention part, balance and entropy", spec=spec,
        experts=FreshExperts(num_experts=8, rank=8, alpha=16.0),
        limits="provisional: the paper is known by its abstract only",
    )  # fmt: skip
