"""HMoRA: token and task routers blended by depth (ICLR 2025; its code at 5215d21)."""

from __future__ import annotations

from compose.routers.gates.blend import BlendGate
from compose.routers.losses.entropies import GeneralisedJensenShannon
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

_EXPERTS = FreshExperts(num_experts=8, rank=8, alpha=16.0, scaling="rslora")
_DEPARTURES = (
    "the task's vector is the mean of the prompt's embeddings; the authors run a trained task encoder on them",
    "the divergence loss sees the blended gates; upstream has one for token and one for task routers",
    "no dropout on the experts' inputs (0.1 upstream)",
)


@enter("hmora")
def hmora() -> Preset:
    """HMoRA: gates shared by q, k and v, and by up and gate; all experts take part."""
    spec = MixtureSpec(
        site="group", gate=BlendGate(), pooling="mean", losses=(GeneralisedJensenShannon(coefficient=0.005),),
        train="both", departures=_DEPARTURES,
    )  # fmt: skip
    return Preset(
        paper="ICLR 2025", summary="token and task routers blended by depth, shared by groups of targets", spec=spec,
        experts=_EXPERTS,
    )  # fmt: skip


@enter("hmora_top2")
def hmora_top2() -> Preset:
    """HMoRA with its top-k strategy as coded: a softmax of the selected probabilities, which is a second softmax."""
    spec = MixtureSpec(
        site="group", gate=BlendGate(), pooling="mean", select=TopK(k=2), renormalise="softmax_probs",
        losses=(GeneralisedJensenShannon(coefficient=0.005),), train="both", departures=_DEPARTURES,
    )  # fmt: skip
    return Preset(
        paper="ICLR 2025", summary="HMoRA with top-2 experts and the second softmax of its code", spec=spec,
        experts=_EXPERTS,
    )  # fmt: skip
