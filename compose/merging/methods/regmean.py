"""regmean: the update that best reproduces each adapter's outputs on its own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors
from compose.merging.method import METHODS, Context, Contract
from compose.merging.subspace import negligible


@METHODS.register("regmean")
@dataclass(frozen=True, kw_only=True)
class RegMean:
    """RegMean (ICLR 2023, arXiv:2212.09849): ``(sum_n w_n delta_n G_n)(sum_n G_n)^-1``.

    ``G_n = X_n^T X_n`` is the Gram matrix ``(I, I)`` of the target's inputs on data of adapter ``n``, its entries off
    the diagonal times ``rho``. The result is exact in factors: ``B = [w_1 B_1 ..]``, ``A = [A_n G_n](sum G)^-1``. A
    weight multiplies its update first and does not weigh its data; adapters of weight 0 are left out with their data.

    The system is solved by Cholesky. Where the sum is singular (inputs that are always 0, or fewer examples than
    inputs at ``rho=1``) its pseudo-inverse is taken: directions no adapter has data for stay unchanged.

    Needs ``context.statistics["input_gram"]``, ``(N, I, I)`` in the order of the updates.

    Attributes:
        rho: Factor of the entries off the diagonal, in [0, 1].
    """

    rho: float = 0.95

    contract: ClassVar[Contract] = Contract(
        summary="least squares on each adapter's inputs; needs their Gram matrices", paper="arXiv:2212.09849"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho must be in [0, 1], got {self.rho}")

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the merge at rank ``sum R_n``.

        Raises:
            IncompatibleError: The statistics are missing, of another shape or not finite.
        """
        grams = _input_grams(deltas, context)
        used = [n for n, weight in enumerate(deltas.weights.tolist()) if weight != 0]
        if not used:
            return deltas.combine(())
        total = deltas.a[0].new_zeros(grams.shape[1:])
        seen = []
        for n in used:
            gram = grams[n].to(deltas.device, deltas.dtype)
            gram = self.rho * gram + (1 - self.rho) * torch.diag(gram.diagonal())
            total += gram
            seen.append(deltas.a[n] @ gram)
        b = torch.cat([deltas.b[n] * float(deltas.weights[n]) for n in used], dim=1)
        return Factors(_solve(total, torch.cat(seen).T).T, b)


def _input_grams(deltas: Deltas, context: Context) -> torch.Tensor:
    grams = (context.statistics or {}).get("input_gram")
    target, expected = deltas.target or "a target", (len(deltas), deltas.shape[1], deltas.shape[1])
    if grams is None:
        raise IncompatibleError(
            f"{target}: regmean needs the statistics 'input_gram' of shape {expected}; measure them on data of every "
            "adapter first"
        )
    if tuple(grams.shape) != expected:
        raise IncompatibleError(f"{target}: 'input_gram' has shape {tuple(grams.shape)}, expected {expected}")
    if not bool(grams.isfinite().all()):
        raise IncompatibleError(f"{target}: 'input_gram' is not finite")
    return grams


def _solve(total: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``total^+ @ right`` for a symmetric ``total (I, I)`` without negative eigenvalues, ``right (I, R)``."""
    triangle, failed = torch.linalg.cholesky_ex(total)
    diagonal = triangle.diagonal()
    if not int(failed) and float(diagonal.min() / diagonal.max()) ** 2 > negligible(total.dtype):
        return torch.cholesky_solve(right, triangle)
    values, vectors = torch.linalg.eigh(total)
    kept = values > negligible(total.dtype) * values[-1].clamp(min=0)
    vectors = vectors[:, kept]
    return vectors @ ((vectors.T @ right) / values[kept][:, None])
