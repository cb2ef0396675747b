"""MOA: a sequence-level router over domain adapters, trained with domain labels (arXiv:2403.03432)."""

from __future__ import annotations

from compose.routers.gates.linear import LinearGate
from compose.routers.losses.gate_ce import GateCrossEntropy
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.argmax import Argmax
from compose.routers.spec import MixtureSpec


@enter("moa")
def moa() -> Preset:
    """MOA (arXiv:2403.03432): stage 2, the router over one trained adapter per domain.

    Each block chooses one adapter for the whole sequence, at full strength; cross-entropy with the row's expert label
    teaches it. For the optional joint stage attach the bank with ``trainable=True`` and use ``train="both"``.
    """
    spec = MixtureSpec(
        site="block", scope="sequence", gate_input="block", pooling="mean", gate=LinearGate(bias=True),
        select=Argmax(), renormalise="sum", losses=(GateCrossEntropy(coefficient=1.0, level="sequence"),),
        train="router",
        departures=(
            "recalled, not verified: a router per block on the mean of the prompt's hidden states, coefficient 1",
        ),
    )  # fmt: skip
    return Preset(
        paper="2403.03432", summary="one domain adapter per sequence, taught by domain labels", spec=spec,
        needs=("expert_labels",),
    )  # fmt: skip
