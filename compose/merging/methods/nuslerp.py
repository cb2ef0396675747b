"""nuslerp: spherical interpolation by weights, of two deltas as a whole or line by line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import column_gram, normalised, row_gram, slerp_coefficients
from compose.merging.method import METHODS, Context, Contract

PARALLEL = 1 - 1e-12  # |cos| above which sin(theta) < 1.5e-6 is too small to divide by


@METHODS.register("nuslerp")
@dataclass(frozen=True, kw_only=True)
class NuSlerp:
    """mergekit's NuSLERP on deltas: `slerp` at ``t = w_2 / (w_1 + w_2)``, as a whole or with one angle per line.

    Per row the multipliers go into ``b`` (``diag(c) B``), per column into ``a`` (``A diag(c)``), so the result stays
    of rank ``R_1 + R_2``; the angles come from row or column Gram matrices. Lines that are parallel, antiparallel or 0
    in one of the adapters are interpolated straight.

    Attributes:
        flatten: One angle for the whole delta.
        row_wise: With ``flatten=False``: one angle per output row; otherwise one per input column.
    """

    flatten: bool = True
    row_wise: bool = False
    contract: ClassVar[Contract] = Contract(
        summary="spherical interpolation of two adapters by weights, whole, by row or by column",
        paper="mergekit (NuSLERP)",
        homogeneous=False,
        one_is_identity=False,
        exact_count=2,
    )

    def __post_init__(self) -> None:
        if self.flatten and self.row_wise:
            raise ValueError("row_wise=True needs flatten=False: a flattened delta has one angle, not one per row")

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the interpolation.

        Raises:
            IncompatibleError: There are not exactly two adapters, or the weights sum to 0.
        """
        if len(deltas) != 2:
            raise IncompatibleError(
                f"{deltas.target or 'a target'}: merge method 'nuslerp' takes exactly two adapters, got "
                f"{len(deltas)}; 'multislerp' and 'karcher' take any number"
            )
        t = float(normalised(deltas, "nuslerp")[1])
        if self.flatten:
            return deltas.combine(slerp_coefficients(deltas.gram, t, PARALLEL))
        lines = row_gram(deltas) if self.row_wise else column_gram(deltas)
        first, second = slerp_coefficients(lines, t, PARALLEL).to(deltas.dtype).unbind(dim=-1)
        if self.row_wise:
            b = torch.cat([first[:, None] * deltas.b[0], second[:, None] * deltas.b[1]], dim=1)
            return Factors(torch.cat(deltas.a), b)
        return Factors(torch.cat([deltas.a[0] * first, deltas.a[1] * second]), torch.cat(deltas.b, dim=1))
