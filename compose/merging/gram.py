"""What the linear family shares: lengths and angles from Gram matrices, normalised weights, balanced factors.

Letters: ``N`` updates, ``R`` rank rows, ``I`` input and ``O`` output width. Gram arithmetic is in float64; nothing
here forms an ``(O, I)`` matrix.
"""

from __future__ import annotations

import torch

from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors, compact

CANCELLED = 1e-6  # a combination this much shorter than its terms together is rounding, not a direction
NEGLIGIBLE = 32.0  # units of machine precision below which a singular value is rounding


def row_gram(deltas: Deltas) -> torch.Tensor:
    """Return ``<line o of delta_n, line o of delta_m>``: ``(O, N, N)`` float64, on the deltas' device."""
    return _line_gram([b.double() for b in deltas.b], [a.double() for a in deltas.a])


def column_gram(deltas: Deltas) -> torch.Tensor:
    """Return ``<column i of delta_n, column i of delta_m>``: ``(I, N, N)`` float64, on the deltas' device."""
    return _line_gram([a.double().T for a in deltas.a], [b.double().T for b in deltas.b])


def _line_gram(outer: list[torch.Tensor], inner: list[torch.Tensor]) -> torch.Tensor:
    """Gram matrices of the lines of ``outer[n] @ inner[n]``: ``diag(X_n Y_n Y_m^T X_m^T)`` for every pair."""
    found = outer[0].new_zeros(outer[0].shape[0], len(outer), len(outer))
    for n in range(len(outer)):
        for m in range(n, len(outer)):
            found[:, n, m] = found[:, m, n] = (outer[n] @ (inner[n] @ inner[m].T) * outer[m]).sum(dim=1)
    return found


def norms(gram: torch.Tensor) -> torch.Tensor:
    """Return the lengths ``(..., N)`` from Gram matrices ``(..., N, N)``."""
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def cosines(gram: torch.Tensor) -> torch.Tensor:
    """Return the cosines ``(..., N, N)`` within [-1, 1]; 0 wherever one of the two vectors is 0."""
    lengths = norms(gram)
    products = lengths[..., :, None] * lengths[..., None, :]
    return torch.where(products > 0, gram / products.where(products > 0, 1.0), 0.0).clamp(-1.0, 1.0)


def length(gram: torch.Tensor, coefficients: torch.Tensor) -> float:
    """Return ``||sum_n coefficients[n] * delta_n||`` from ``(N, N)``, exactly 0 where the terms cancel.

    A sum shorter than 1e-6 of its terms' lengths together is rounding of the Gram matrix and counts as 0.
    """
    whole = float((coefficients.abs() * norms(gram)).sum())
    found = max(float(coefficients @ gram @ coefficients), 0.0) ** 0.5
    return found if found > CANCELLED * whole else 0.0


def slerp_coefficients(pairs: torch.Tensor, t: float, parallel: float) -> torch.Tensor:
    """Return the two multipliers of spherical interpolation.

    ``sin((1-t) theta) / sin theta`` and ``sin(t theta) / sin theta``; ``1-t`` and ``t`` where ``|cos theta|`` is above
    ``parallel`` (there ``sin theta`` is too small to divide by) or one of the two is 0 and has no direction.

    Args:
        pairs: Gram matrices of two vectors ``(..., 2, 2)``.
        t: 0 gives the first vector, 1 the second.
        parallel: In (0, 1).

    Returns:
        ``(..., 2)``.
    """
    cosine = cosines(pairs)[..., 0, 1]
    straight = (cosine.abs() > parallel) | (norms(pairs) == 0).any(dim=-1)
    theta = cosine.acos()
    sine = theta.sin().where(~straight, 1.0)
    first = ((1 - t) * theta).sin().div(sine).where(~straight, 1 - t)
    second = (t * theta).sin().div(sine).where(~straight, t)
    return torch.stack([first, second], dim=-1)


def normalised(deltas: Deltas, method: str) -> torch.Tensor:
    """Return the weights divided by their sum: ``(N,)`` float64.

    Raises:
        IncompatibleError: They sum to 0.
    """
    total = float(deltas.weights.sum())
    if abs(total) <= 1e-12 * float(deltas.weights.abs().sum()):
        raise IncompatibleError(
            f"{deltas.target or 'a target'}: merge method {method!r} divides by the sum of the weights, which is 0 "
            f"for {deltas.weights.tolist()}; change a weight, or use a method that does not normalise, such as 'sum'"
        )
    return deltas.weights / total


def shares(deltas: Deltas, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``|w_n| / sum |w|`` and the signs of the weights, ``(N,)`` float64 each.

    For methods that average directions: an adapter of negative weight takes part as its negation.

    Raises:
        IncompatibleError: Every weight is 0.
    """
    sizes = deltas.weights.abs()
    if float(sizes.sum()) == 0:
        raise IncompatibleError(
            f"{deltas.target or 'a target'}: merge method {method!r} needs a weight that is not 0, got "
            f"{deltas.weights.tolist()}"
        )
    return sizes / sizes.sum(), deltas.weights.sign()


def balanced(a: torch.Tensor, b: torch.Tensor) -> Factors:
    """Return the factors of ``b @ a`` in the gauge that belongs to the delta alone, strongest direction first.

    Row ``j`` of ``a (R, I)`` and column ``j`` of ``b (O, R)`` are the singular vectors, each times the root of the
    singular value; the pair's sign, which a decomposition leaves open, makes the entry of largest magnitude in the row
    of ``a`` positive. Singular values that are rounding are left out, so that rank which an adapter has on paper only
    does not count; a delta of 0 has rank 0. Where singular values coincide the basis stays arbitrary.
    """
    found, _ = compact(Factors(a, b))
    values = found.a.square().sum(dim=1)
    if len(values):
        kept = values > NEGLIGIBLE * torch.finfo(values.dtype).eps * values[0]
        found = Factors(found.a[kept], found.b[:, kept])
    sign = found.a.gather(1, found.a.abs().argmax(dim=1, keepdim=True)).sign()
    return Factors(found.a * sign, found.b * sign.T)
