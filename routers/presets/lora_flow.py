"""LoRA-Flow: fusion weights per token and block over trained adapters (arXiv:2402.11455)."""

from __future__ import annotations

from compose.routers.gates.linear import LinearGate
from compose.routers.presets.registry import Preset, enter
from compose.routers.spec import MixtureSpec


@enter("lora_flow")
def lora_flow() -> Preset:
    """LoRA-Flow (arXiv:2402.11455): ``w = softmax(W x) + b`` on what enters the block; ``b`` is learned too.

    The bias stands outside the softmax, so weights may be negative or above 1. The authors' ``b`` for their two
    adapters: ``preset("lora_flow", post_init=(-0.5, 0.5))``.
    """
    spec = MixtureSpec(
        site="block", gate_input="block", gate=LinearGate(init="zeros"), post="bias", train="router",
        departures=(
            "biases start at 0; the authors' at -0.5 and 0.5 for their two adapters",
            "recalled, not verified: the gate's weights start at 0",
        ),
    )  # fmt: skip
    return Preset(
        paper="2402.11455", summary="fusion weights per token and block, bias outside the softmax", spec=spec
    )
