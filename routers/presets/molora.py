"""MoLoRA and MoV: soft mixtures per token (arXiv:2309.05444)."""

from __future__ import annotations

from compose.routers.gates.linear import LinearGate
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec

_GATE = LinearGate(init="normal", std=0.02)


@enter("molora")
def molora() -> Preset:
    """MoLoRA (arXiv:2309.05444): ``softmax(x W)`` over all experts, per token and target; 10 experts of rank 4.

    The code's ``top_k`` masks without renormalising: ``preset("molora", select=TopK(k=2))``.
    """
    spec = MixtureSpec(gate=_GATE, train="both")
    return Preset(
        paper="2309.05444", summary="soft mixture of LoRA experts per token and target", spec=spec,
        experts=FreshExperts(num_experts=10, rank=4, alpha=16.0, init="normal", std=0.02),
    )  # fmt: skip


@enter("mov")
def mov() -> Preset:
    """MoV (arXiv:2309.05444): experts are vectors that scale the target's output, merged before use."""
    spec = MixtureSpec(
        gate=_GATE, structure="ia3", train="both",
        departures=("vectors stand on every routed target, as the authors' code, not on keys, values and FFN alone",),
    )  # fmt: skip
    return Preset(
        paper="2309.05444", summary="soft mixture of output vectors (IA3) per token and target", spec=spec,
        experts=FreshExperts(num_experts=10, init="empty"),
    )  # fmt: skip
