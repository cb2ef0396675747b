"""model_stock: the mean, shortened by how little the deltas agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import cosines, row_gram, shares
from compose.merging.method import METHODS, Context, Contract


@METHODS.register("model_stock")
@dataclass(frozen=True, kw_only=True)
class ModelStock:
    """``t * mean(delta)`` with ``t = N c / (1 + (N-1) c)``, ``c`` the mean pairwise cosine (arXiv:2403.19522).

    The paper derives ``t`` from one angle common to all pairs; for more than two adapters ``c`` is the mean over
    pairs, as in mergekit. A negative ``c`` lies outside the paper's geometry and counts as 0, so that ``t`` stays in
    [0, 1]. A delta of 0 has cosine 0 with everything; one adapter has ``t = 1``. Adapters of weight 0 are left out.
    The paper has no weights: here the mean is weighted by ``|w_n| / sum |w|``, and an adapter of negative weight takes
    part as its negation.

    Attributes:
        filter_wise: One ``t`` per output row (the paper's filters) instead of one for the target, from the row Grams;
            ``t`` goes into ``b``.
    """

    filter_wise: bool = False
    contract: ClassVar[Contract] = Contract(
        summary="mean times the Model Stock ratio of agreement", paper="arXiv:2403.19522", homogeneous=False
    )

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the shortened mean, of rank ``sum R_n``.

        Raises:
            IncompatibleError: Every weight is 0.
        """
        share, sign = shares(deltas, "model_stock")
        used = (sign != 0).to(deltas.device)
        mean = deltas.combine(share * sign)
        gram = row_gram(deltas) if self.filter_wise else deltas.gram
        turned = sign.to(deltas.device)
        ratio = _ratio((gram * turned * turned[:, None])[..., used, :][..., used])
        return Factors(mean.a, mean.b * ratio.to(deltas.dtype)[..., None])


def _ratio(gram: torch.Tensor) -> torch.Tensor:
    """Return ``t (...)`` from Gram matrices ``(..., N, N)``."""
    count = gram.shape[-1]
    if count == 1:
        return gram.new_ones(gram.shape[:-2])
    angles = cosines(gram)
    pairs = angles.sum(dim=(-2, -1)) - angles.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    agreement = (pairs / (count * (count - 1))).clamp(min=0)
    return count * agreement / (1 + (count - 1) * agreement)
