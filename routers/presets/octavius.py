"""Octavius: one gate per instance for the whole model (arXiv:2311.02684)."""

from __future__ import annotations

from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

_DEPARTURES = (
    "recalled, not verified: rank 32",
    "the code's random second expert and its capacity never take effect, so they are left out",
)


def _spec(departures: tuple[str, ...]) -> MixtureSpec:
    return MixtureSpec(
        site="model", scope="sequence", gate_input="embeddings", pooling="mean", select=TopK(k=2), renormalise="sum",
        train="both", departures=departures,
    )  # fmt: skip


@enter("octavius")
def octavius() -> Preset:
    """Octavius (arXiv:2311.02684): ``softmax(mean_t(embedding_t) W)`` of the prompt, top-2, for all layers."""
    departures = (*_DEPARTURES, "the authors' code never applies the scaling; that is preset octavius_noscale")
    return Preset(
        paper="2311.02684", summary="top-2 experts per instance from prompt embeddings, one gate for all layers",
        spec=_spec(departures), experts=FreshExperts(num_experts=4, rank=32, alpha=64.0),
    )  # fmt: skip


@enter("octavius_noscale")
def octavius_noscale() -> Preset:
    """Octavius as its code computes it: experts without scaling (alpha equals the rank)."""
    return Preset(
        paper="2311.02684", summary="Octavius without scaling, as its code", spec=_spec(_DEPARTURES),
        experts=FreshExperts(num_experts=4, rank=32, alpha=32.0),
    )  # fmt: skip
