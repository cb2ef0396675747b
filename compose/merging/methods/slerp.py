"""slerp: spherical interpolation of two deltas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import normalised, slerp_coefficients
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("slerp")
@dataclass(frozen=True, kw_only=True)
class Slerp:
    """``sin((1-t) theta)/sin(theta) delta_1 + sin(t theta)/sin(theta) delta_2``, theta the angle between the deltas.

    Spherical interpolation (Shoemake, 1985) as merging tools use it, on the whole delta as one vector: the angle comes
    from the Gram matrix, so the result is an exact combination of rank ``R_1 + R_2``. Above ``|cos theta| = 0.9995``,
    and where a delta is 0, it is the straight line ``(1-t) delta_1 + t delta_2``; antiparallel deltas of equal length
    therefore meet in 0 at ``t = 1/2``. mergekit interpolates whole weights, base model included; here it is the
    deltas.

    Attributes:
        t: 0 gives the first adapter, 1 the second, values outside go beyond them. None takes
            ``w_2 / (w_1 + w_2)`` from the weights; given a ``t`` the weights are not used, and the order of the two
            adapters matters.
    """

    t: float | None = None
    contract: ClassVar[Contract] = Contract(
        summary="spherical interpolation of two adapters",
        paper="Shoemake 1985",
        homogeneous=False,
        one_is_identity=False,
        exact_count=2,
    )

    def __post_init__(self) -> None:
        if self.t is not None and not math.isfinite(self.t):
            raise ValueError(f"t must be a finite number (0 is the first adapter, 1 the second), got {self.t}")

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the interpolation.

        Raises:
            IncompatibleError: There are not exactly two adapters, or ``t`` is None and the weights sum to 0.
        """
        if len(deltas) != 2:
            raise IncompatibleError(
                f"{deltas.target or 'a target'}: merge method 'slerp' takes exactly two adapters, got {len(deltas)}; "
                "'multislerp' and 'karcher' take any number"
            )
        t = float(normalised(deltas, "slerp")[1]) if self.t is None else self.t
        return deltas.combine(slerp_coefficients(deltas.gram, t, parallel=0.9995))
