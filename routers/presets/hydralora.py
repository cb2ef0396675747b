"""HydraLoRA: one A, many B (arXiv:2404.19245)."""

from __future__ import annotations

from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec


@enter("hydralora")
def hydralora() -> Preset:
    """HydraLoRA (arXiv:2404.19245): ``Σ softmax(x W)_e s B_e A x`` with one shared A; sizes as in its script."""
    spec = MixtureSpec(
        structure="shared_a", train="both",
        departures=(
            "all linear layers; the authors' script names the FFN's",
            "the number of experts is given (4, as the script), not found by clustering",
            "no dropout on the experts' inputs (0.05 upstream)",
        ),
    )  # fmt: skip
    return Preset(
        paper="2404.19245", summary="soft mixture of B factors over one shared A", spec=spec,
        experts=FreshExperts(num_experts=4, rank=4, alpha=32.0, init="tied"),
    )  # fmt: skip
