"""MultiLoRA: parallel LoRAs with learned scales (arXiv:2311.11501)."""

from __future__ import annotations

from compose.routers.gates.table import TableGate
from compose.routers.normalisations.identity import Identity
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec


@enter("multilora")
def multilora() -> Preset:
    """MultiLoRA (arXiv:2311.11501): A and B start at random, and a scale per expert and target that starts at 0."""
    spec = MixtureSpec(
        scope="static", gate_input="none", gate=TableGate(init="zeros"), normalise=Identity(), train="both",
        departures=(
            "recalled, not verified: 3 experts of rank 8; one number per expert and target as scale",
        ),
    )  # fmt: skip
    return Preset(
        paper="2311.11501", summary="parallel LoRAs with learned scales that start at 0", spec=spec,
        experts=FreshExperts(num_experts=3, rank=8, alpha=16.0, init="kaiming_both"),
    )  # fmt: skip
