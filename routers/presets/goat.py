"""GOAT: experts from segments of the weight's spectrum (arXiv:2502.16894; its code at ef4d21a)."""

from __future__ import annotations

from compose.routers.losses.load_balance import MixtralLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("goat")
def goat() -> Preset:
    """GOAT: rank 32 in 8 experts that start as segments of ``W``, scaled by ``sqrt(3 eta n / r)``, eta = 1.

    The base becomes ``W - mean_e s B_e A_e`` of the initial factors. That is computed beside the base, which is not
    edited: switching the router off gives the base model.
    """
    spec = MixtureSpec(
        select=TopK(k=2), renormalise="sum", losses=(MixtralLoadBalance(coefficient=1e-3),), train="both",
        subtract_start=True,
        departures=(
            "the residual is computed beside the base instead of being written into it (equal up to rounding)",
            "the balance coefficient 1e-3 is not a published value (a required argument of its scripts, 1 by default)",
            "no dropout on the experts' inputs (0.05 upstream)",
            "at targets narrower than 32 an expert's rank is that of its segment; upstream's segments overlap there",
        ),
    )  # fmt: skip
    return Preset(
        paper="2502.16894", summary="top-2 experts that start as segments of the weight's spectrum", spec=spec,
        experts=FreshExperts(num_experts=8, rank=4, alpha=1.0, scaling="width", init="segments"),
        limits="the base must not be quantised",
    )  # fmt: skip
