"""SMEAR: experts' parameters averaged per sequence (arXiv:2306.03745)."""

from __future__ import annotations

from compose.routers.gates.linear import LinearGate
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec


@enter("smear")
def smear() -> Preset:
    """SMEAR (arXiv:2306.03745): softmax of the normalised mean of the prompt's hidden states; parameters mixed.

    One gate for the attention part and one for the feed-forward part of each layer. Gates of a decoder read the
    encoder's mean, as published.
    """
    spec = MixtureSpec(
        site="block_part", scope="sequence", pooling="mean", gate=LinearGate(layer_norm=True), combine="parameters",
        train="both",
        departures=(
            "experts are LoRA on the linear layers; the paper's are bottleneck adapters behind each part",
            "recalled, not verified: 8 experts of rank 8; normalisation without learned scale",
        ),
    )  # fmt: skip
    return Preset(
        paper="2306.03745", summary="parameters averaged per sequence, a gate per part of a layer", spec=spec,
        experts=FreshExperts(num_experts=8, rank=8, alpha=16.0),
    )  # fmt: skip
