"""MoCLE: cluster-conditional experts and a universal one (arXiv:2312.12379)."""

from __future__ import annotations

from compose.routers.gates.embedding import EmbeddingGate
from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.argmax import Argmax
from compose.routers.spec import MixtureSpec

UNIVERSAL = "universal"
_EXPERTS = FreshExperts(num_experts=4, always_on=(UNIVERSAL,), rank=8, alpha=16.0)
_DEPARTURES = (
    "cluster numbers come with the batch (MoCLE: k-means of sentence embeddings); nothing is clustered in the layers",
    "recalled, not verified: rank 8; the noise's deviation 0.1 is not a published value",
)


def _spec(power: int, departures: tuple[str, ...]) -> MixtureSpec:
    return MixtureSpec(
        scope="sequence", gate_input="cluster_id", gate=EmbeddingGate(of="clusters", width=384, bias=True),
        normalise=Softmax(temperature=0.05), select=Argmax(), gate_power=power, always_on=(UNIVERSAL,),
        universal="complement", noise=0.1, train="both", departures=departures,
    )  # fmt: skip


@enter("mocle")
def mocle() -> Preset:
    """MoCLE (arXiv:2312.12379): ``w E_top(x) + (1 - w) E_universal(x)``, ``w`` the gate of the row's cluster."""
    spec = _spec(1, (*_DEPARTURES, "the authors' code weights the expert by w squared; that is preset mocle_g2"))
    return Preset(
        paper="2312.12379", summary="expert of the row's cluster and a universal one", spec=spec, experts=_EXPERTS,
        needs=("clusters",),
    )  # fmt: skip


@enter("mocle_g2")
def mocle_g2() -> Preset:
    """MoCLE as its code computes it: ``w² E_top(x) + (1 - w) E_universal(x)``."""
    spec = _spec(2, _DEPARTURES)
    return Preset(
        paper="2312.12379", summary="MoCLE with the expert weighted by the gate's square, as its code", spec=spec,
        experts=_EXPERTS, needs=("clusters",),
    )  # fmt: skip
