"""Gates from means of what experts' data look like: mean activations (mttl) and CoLoR's centroids."""

from __future__ import annotations

from compose.routers.gates.proto import ProtoGate
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("avg_act")
def avg_act() -> Preset:
    """Mean activations (mttl's ``avg_act_router``, beside Arrow, arXiv:2405.11157): ``x . mean_e / sqrt(D)``, softmax.

    The means are those of each target's inputs over the expert's own data: `compose.routers.calibration.calibrate`.
    """
    spec = MixtureSpec(
        gate=ProtoGate(source="calibrated", score="dot", sqrt_width=True), train="none",
        departures=("means over all real tokens; mttl's default is the last token (calibrate(..., tokens='last'))",),
    )  # fmt: skip
    return Preset(
        paper="2405.11157",
        summary="gates from the mean input of each expert's data",
        spec=spec,
        needs=("calibration",),
    )


@enter("color")
def color() -> Preset:
    """CoLoR (arXiv:2311.17601): the expert whose data has a centroid nearest to the base model's features.

    ``P = 5`` centroids per expert by k-means; features are means over the prompt of the base model's last states. One
    expert at full strength.
    """
    spec = MixtureSpec(
        site="model", scope="sequence", gate_input="first_pass", pooling="mean",
        gate=ProtoGate(source="calibrated", score="l2", per_expert=5), select=TopK(k=1), renormalise="softmax",
        train="none",
        departures=("features are means over a prompt; CoLoR reads a vision transformer's class token",),
    )  # fmt: skip
    return Preset(
        paper="2311.17601", summary="the expert of the nearest centroid of base features", spec=spec,
        needs=("calibration",),
    )  # fmt: skip
