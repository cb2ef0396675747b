"""Arrow: training-free gates from the factors' first singular directions (arXiv:2405.11157)."""

from __future__ import annotations

from compose.routers.gates.proto import ProtoGate
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

_EXACT = (
    "v_e is exact, from an r x r singular value decomposition in float64; PEFT's 15 power iterations depend on a seed"
)


@enter("arrow")
def arrow() -> Preset:
    """Arrow (arXiv:2405.11157) as in PEFT: ``|x . v_e|``, softmax of the k = 3 highest, outputs mixed.

    ``|x . v_e|`` grows with x: ``gate=ProtoGate(unit_input=True)`` with
    ``normalise=Softmax(temperature=...)`` makes sharpness independent of it. General knowledge is subtracted before
    attaching, on a copy of the experts: `compose.routers.general_knowledge.subtract_general`.
    """
    spec = MixtureSpec(
        gate=ProtoGate(source="svd", score="abs"), select=TopK(k=3), renormalise="softmax", train="none",
        departures=(_EXACT,),
    )  # fmt: skip
    return Preset(paper="2405.11157", summary="gates from each expert's first singular direction", spec=spec)


@enter("arrow_mttl")
def arrow_mttl() -> Preset:
    """Arrow as the authors' library computes it: parameters are mixed per token, ``(Σ g B)(Σ g A) x``, k = 4."""
    spec = MixtureSpec(
        gate=ProtoGate(source="svd", score="abs"), select=TopK(k=4), renormalise="softmax", train="none",
        combine="parameters",
        departures=(_EXACT, "with unequal scalings each factor carries the root of its own; upstream has one scaling"),
    )  # fmt: skip
    return Preset(
        paper="2405.11157", summary="Arrow with the factors of chosen experts mixed per token", spec=spec,
        limits="mixes factors for every token: memory and time of N r (D + O) numbers per target; no sparse path. "
        "Not the function of 'arrow', and not exportable as one adapter",
    )  # fmt: skip
