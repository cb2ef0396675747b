r"""Statistics of one target's delta from its factors: spectrum, norm and kurtosis, never the ``(O, I)`` matrix.

Letters: ``O`` output width, ``I`` input width, ``R`` rank, ``M`` targets.

The spectrum is that of an ``(R, R)`` matrix between two QR decompositions, exact. The five numbers are those of
"Weight space Detection of Backdoors in LoRA Adapters" (arXiv:2602.15195), which takes them of dense deltas.

Kurtosis. With ``delta[o, i] = sum_r b[o, r] a[r, i]`` the k-th raw moment of the entries is

    m_k = 1/(O I) sum_{r1..rk} (sum_o b[o, r1] .. b[o, rk]) (sum_i a[r1, i] .. a[rk, i]),

a product of two tensors of order k in ``R``: order 4 costs ``R^4 (O + I)``, and by the symmetry of ``(r1, r2)`` and of
``(r3, r4)`` a quarter of it, as one Gram matrix of ``R (R + 1) / 2`` products per line. Kurtosis is the fourth central
moment over the square of the second. Where ``R`` is so large that rows of the delta are cheaper than ``R^4``, they are
made a few at a time instead; both are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compose.adapter import Adapter, LowRank
from compose.hub_index.records import StatRecord
from compose.merging.deltas import Factors
from compose.merging.subspace import triplets

LEADING = 8
"""Singular values that are kept."""

_ROW_ENTRIES = 2**20
_MOST = 1e250


@dataclass(frozen=True)
class ModuleStatistics:
    """Statistics of one target's delta, scaling included.

    Attributes:
        module: Its path.
        rank: ``R`` of the factors.
        leading: Its largest singular values, falling, at most `LEADING`.
        fro: Frobenius norm.
        energy1: ``sigma1^2 / fro^2``, 0 for a delta of 0.
        spec_entropy: Entropy in nats of the shares ``sigma_j^2 / fro^2``; 0 for rank 1, ``log R`` for equal ones.
        kurtosis: Of the entries, 3 for a normal distribution; 0 where all entries are equal.
        num_nonfinite: Values of the factors that are NaN or infinite, or 1 where their product is beyond float64; the
            other numbers are then 0.
        b_zero: Whether B is all zeros.
    """

    module: str
    rank: int
    leading: tuple[float, ...] = ()
    fro: float = 0.0
    energy1: float = 0.0
    spec_entropy: float = 0.0
    kurtosis: float = 0.0
    num_nonfinite: int = 0
    b_zero: bool = False

    @property
    def sigma1(self) -> float:
        """Largest singular value."""
        return self.leading[0] if self.leading else 0.0

    def to_record(self) -> StatRecord:
        """Return what an index stores of it; numbers that are not defined are None there."""
        finite, shaped = self.num_nonfinite == 0, self.fro > 0
        return StatRecord(
            module=self.module,
            sigma1=self.sigma1 if finite else None,
            fro=self.fro if finite else None,
            energy1=self.energy1 if shaped else None,
            spec_entropy=self.spec_entropy if shaped else None,
            kurtosis=self.kurtosis if shaped else None,
            num_nonfinite=self.num_nonfinite,
            b_zero=self.b_zero,
        )

    @classmethod
    def of_record(cls, record: StatRecord, rank: int) -> ModuleStatistics:
        """Return what an index stored, with the leading singular value alone."""
        return cls(
            record.module,
            rank,
            leading=(record.sigma1,) if record.sigma1 else (),
            fro=record.fro or 0.0,
            energy1=record.energy1 or 0.0,
            spec_entropy=record.spec_entropy or 0.0,
            kurtosis=record.kurtosis or 0.0,
            num_nonfinite=record.num_nonfinite,
            b_zero=record.b_zero,
        )


def adapter_statistics(adapter: Adapter) -> dict[str, ModuleStatistics]:
    """Return the statistics of every target, in the adapter's order."""
    return {module: module_statistics(module, update) for module, update in adapter.targets.items()}


def module_statistics(module: str, update: LowRank) -> ModuleStatistics:
    """Return the statistics of one update; they do not depend on how it is split into factors.

    Args:
        module: Its path.
        update: ``a (R, I)``, ``b (O, R)``, any dtype; arithmetic is in float64.
    """
    a, b = update.a.detach().double().cpu(), update.b.detach().double().cpu()
    bad = int((~torch.isfinite(a)).sum() + (~torch.isfinite(b)).sum()) + (not math.isfinite(update.scaling))
    b_zero = not bool(b.any())
    if bad:
        return ModuleStatistics(module, update.rank, num_nonfinite=bad, b_zero=b_zero)
    return factor_statistics(module, Factors(a, b), update.scaling, b_zero=b_zero)


def factor_statistics(
    module: str, factors: Factors, scaling: float = 1.0, *, b_zero: bool = False
) -> ModuleStatistics:
    """Return the statistics of ``scaling * factors.b @ factors.a`` (float64, finite)."""
    rank = factors.a.shape[0]
    sizes = [float(part.abs().max()) if rank else 0.0 for part in factors]
    size = sizes[0] * sizes[1] * abs(scaling)  # spectrum and kurtosis are those of factors of size 1
    if size == 0.0:
        return ModuleStatistics(module, rank, b_zero=b_zero)
    if size > _MOST:
        return ModuleStatistics(module, rank, num_nonfinite=1, b_zero=b_zero)
    found = triplets(factors.b / sizes[1], (factors.a / sizes[0]).T)
    energies = found.s.square()
    total = float(energies.sum())
    if total == 0.0:
        return ModuleStatistics(module, rank, b_zero=b_zero)
    shares = energies / total
    root = found.s.sqrt()
    return ModuleStatistics(
        module,
        rank,
        leading=tuple((found.s[:LEADING] * size).tolist()),
        fro=math.sqrt(total) * size,
        energy1=float(shares[0]),
        spec_entropy=max(-float(torch.special.xlogy(shares, shares).sum()), 0.0),
        kurtosis=kurtosis(Factors(root[:, None] * found.v.T, found.u * root)),
        b_zero=b_zero,
    )


def kurtosis(factors: Factors) -> float:
    """Return the kurtosis of the entries of ``factors.b @ factors.a``, 0 where they are all equal.

    Args:
        factors: ``a (R, I)`` and ``b (O, R)``, float64.
    """
    out, rank = factors.b.shape
    wide = factors.a.shape[1]
    if rank == 0:
        return 0.0
    by_factors = (rank * (rank + 1) / 2) ** 2 * (out + wide)
    moments = _factor_moments if by_factors <= 2.0 * out * wide * rank else _row_moments
    first, second, third, fourth = moments(factors)
    variance = second - first**2
    if variance <= 1e-14 * second:
        return 0.0
    return (fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4) / variance**2


def _factor_moments(factors: Factors) -> tuple[float, float, float, float]:
    """Return the first four raw moments of the entries, from products of factors alone."""
    a, b = factors.a.T, factors.b  # (I, R), (O, R)
    count = float(len(a) * len(b))
    rank = a.shape[1]
    left, right = torch.triu_indices(rank, rank)
    twice = torch.where(left == right, 1.0, 2.0).double()  # (r1, r2) and (r2, r1)
    pairs_a, pairs_b = a[:, left] * a[:, right], b[:, left] * b[:, right]
    first = float(a.sum(0) @ b.sum(0))
    second = float(((a.T @ a) * (b.T @ b)).sum())
    third = float((((pairs_a.T @ a) * (pairs_b.T @ b)).sum(1) * twice).sum())
    fourth = float(twice @ ((pairs_a.T @ pairs_a) * (pairs_b.T @ pairs_b)) @ twice)
    return first / count, second / count, third / count, fourth / count


def _row_moments(factors: Factors) -> tuple[float, float, float, float]:
    """Return the same, from rows of the delta, at most `_ROW_ENTRIES` entries of it at a time."""
    out, wide = factors.b.shape[0], factors.a.shape[1]
    step = max(1, _ROW_ENTRIES // wide)
    sums = [0.0] * 4
    for low in range(0, out, step):
        rows = factors.b[low : low + step] @ factors.a
        squares = rows.square()
        parts = (rows.sum(), squares.sum(), (squares * rows).sum(), squares.square().sum())
        sums = [total + float(part) for total, part in zip(sums, parts, strict=True)]
    count = float(out * wide)
    return sums[0] / count, sums[1] / count, sums[2] / count, sums[3] / count


def to_records(found: Mapping[str, ModuleStatistics]) -> tuple[StatRecord, ...]:
    """Return what an index stores of an adapter's statistics."""
    return tuple(one.to_record() for one in found.values())
