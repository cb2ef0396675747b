"""MixLoRA's router over the linear layers of the FFN (arXiv:2404.15159); `mixlora_ffn` is the method as published."""

from __future__ import annotations

from compose.routers.gates.linear import LinearGate
from compose.routers.losses.load_balance import MixtralLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec
from compose.routers.target_patterns import FEED_FORWARD


@enter("mixlora_lin")
def mixlora_lin() -> Preset:
    """MixLoRA (arXiv:2404.15159) linearised: the FFN's linear layers share one top-2 gate that reads the FFN's input.

    Published MixLoRA runs a whole FFN per expert; here each linear layer mixes its own updates, so the activation sees
    the mixture instead of one expert at a time.
    """
    spec = MixtureSpec(
        site="block_part", targets=FEED_FORWARD, gate=LinearGate(init="normal", std=0.02), select=TopK(k=2),
        renormalise="sum", losses=(MixtralLoadBalance(coefficient=1e-3),), train="both",
        departures=(
            "updates are mixed per linear layer, before the activation; MixLoRA's experts are whole FFNs",
            "no plain LoRA on the attention part",
            "recalled, not verified: rank 16, alpha 32",
        ),
    )  # fmt: skip
    return Preset(
        paper="2404.15159", summary="top-2 gate shared by the FFN's linear layers", spec=spec,
        experts=FreshExperts(num_experts=8, rank=16, alpha=32.0),
    )  # fmt: skip
