"""DynMoLE: from sparse to dense by the entropy of the gate (arXiv:2504.00661)."""

from __future__ import annotations

from compose.routers.losses.entropies import Tsallis
from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.entropy_switch import EntropySwitch
from compose.routers.spec import MixtureSpec


@enter("dynmole")
def dynmole() -> Preset:
    """DynMoLE: all experts where the Tsallis entropy is high, else the nucleus of 0.75; entropy and balance losses."""
    spec = MixtureSpec(
        select=EntropySwitch(), renormalise="sum", train="both",
        losses=(Tsallis(coefficient=1e-2), SwitchLoadBalance(coefficient=1e-3)),
        departures=(
            "the paper was read as its abstract, options are those of its code",
            "recalled, not verified: 8 experts of rank 8, balance coefficient 1e-3, gates divided by their sum",
        ),
    )  # fmt: skip
    return Preset(
        paper="2504.00661", summary="dense or nucleus by the gate's entropy", spec=spec,
        experts=FreshExperts(num_experts=8, rank=8, alpha=16.0),
    )  # fmt: skip
