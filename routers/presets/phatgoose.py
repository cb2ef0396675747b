"""PHATGOOSE: gates trained one expert at a time, after the experts (arXiv:2402.05859)."""

from __future__ import annotations

from compose.routers.gates.proto import ProtoGate
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("phatgoose")
def phatgoose() -> Preset:
    """PHATGOOSE (arXiv:2402.05859): ``LN(x) . LN(v_e) / sqrt(D)``, softmax of the two highest.

    Each ``v_e`` trains alone, as a sigmoid gate on its expert over that expert's data:
    `compose.routers.phatgoose.train_phatgoose_gates`.
    """
    spec = MixtureSpec(
        gate=ProtoGate(source="trained", score="layer_norm", sqrt_width=True), select=TopK(k=2), renormalise="softmax",
        train="none",
    )  # fmt: skip
    return Preset(
        paper="2402.05859", summary="top-2 gates, each trained alone on its expert's data", spec=spec,
        needs=("calibration",),
    )  # fmt: skip
