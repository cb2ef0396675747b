"""LD-MoLE: learned sparsity by sparsegen (arXiv:2509.25684)."""

from __future__ import annotations

from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.losses.sparsity import SparsityInterval
from compose.routers.losses.z_loss import ZLoss
from compose.routers.normalisations.sparsegen import Sparsegen
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec


@enter("ld_mole")
def ld_mole() -> Preset:
    """LD-MoLE (arXiv:2509.25684): sparsegen decides per token how many experts take part.

    One network makes its lambda. The losses balance the load, keep scores small and hold the number of experts near 2.
    """
    spec = MixtureSpec(
        normalise=Sparsegen(), train="both",
        losses=(SwitchLoadBalance(coefficient=1e-2), ZLoss(coefficient=1e-3), SparsityInterval(coefficient=0.01, k=2)),
        departures=(
            "recalled, not verified: 8 experts of rank 8, coefficients 1e-2 (balance) and 1e-3 (z)",
            "the sparsity coefficient 0.01 is not a published value (its code sets it per run, 0 by default)",
            "one lambda network for each width of inputs",
        ),
    )  # fmt: skip
    return Preset(
        paper="2509.25684", summary="learned number of experts per token (sparsegen)", spec=spec,
        experts=FreshExperts(num_experts=8, rank=8, alpha=16.0),
    )  # fmt: skip
