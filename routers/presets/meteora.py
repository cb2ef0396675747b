"""MeteoRA: supervised top-2 gates over trained adapters (arXiv:2405.13053)."""

from __future__ import annotations

from compose.routers.gates.linear import LinearGate
from compose.routers.losses.gate_ce import GateCrossEntropy
from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("meteora")
def meteora() -> Preset:
    """MeteoRA (arXiv:2405.13053): a gate per target, softmax of the two highest scores, taught the adapter's number.

    For texts composed of several tasks the authors raise the temperature: 15, 20 and 30 for 3, 5 and 10 parts,
    ``preset("meteora", normalise=Softmax(temperature=15.0))``.
    """
    spec = MixtureSpec(
        gate=LinearGate(init="normal", std=1.0), normalise=Softmax(temperature=1.0), select=TopK(k=2),
        renormalise="softmax", losses=(GateCrossEntropy(coefficient=50.0, level="token"),), train="router",
        departures=("padding is not taught (upstream counts it as tokens of the row's adapter)",),
    )  # fmt: skip
    return Preset(
        paper="2405.13053", summary="top-2 gates over trained adapters, taught each token's adapter", spec=spec,
        needs=("expert_labels",),
    )  # fmt: skip
