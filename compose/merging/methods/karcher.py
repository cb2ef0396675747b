"""karcher: the Riemannian centre of mass of the deltas' directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compose.merging.deltas import Deltas, Factors
from compose.merging.gram import cosines, length, norms, shares
from compose.merging.method import METHODS, Context, Contract

FLAT = 1e-6  # sines below this: at the point itself theta / sin(theta) is 1, at its antipode there is no direction


@METHODS.register("karcher")
@dataclass(frozen=True, kw_only=True)
class Karcher:
    """The Karcher mean (Karcher, 1977) of ``delta_n / ||delta_n||`` on the sphere, times the mean norm.

    From the normalised weighted sum of directions, repeat ``u <- exp_u(sum_n p_n log_u(u_n))`` with
    ``p_n = |w_n| / sum |w|``. Every ``u`` is a combination of the directions, so the iteration runs on ``N``
    coefficients and the ``(N, N)`` cosines. A negative weight makes the adapter take part as its negation. A delta of
    0 has no direction: the others' shares decide the direction, and it counts with length 0 in the mean norm
    ``sum p_n ||delta_n||``. Directions that cancel have no mean; the result is 0. mergekit averages whole weights
    this way; here it is the deltas.

    Attributes:
        max_iter: Steps at most.
        tol: Stop when the step is shorter than this angle.
    """

    max_iter: int = 10
    tol: float = 1e-5
    contract: ClassVar[Contract] = Contract(
        summary="Riemannian mean direction at the mean norm", paper="Karcher 1977", homogeneous=False
    )

    def __post_init__(self) -> None:
        if self.max_iter < 0:
            raise ValueError(f"max_iter must be at least 0, got {self.max_iter}")
        if not self.tol >= 0:
            raise ValueError(f"tol must be at least 0, got {self.tol}")

    def merge(self, deltas: Deltas, context: Context) -> Factors:
        """Return the mean.

        Raises:
            IncompatibleError: Every weight is 0.
        """
        share, sign = shares(deltas, "karcher")
        gram = deltas.gram.cpu() * sign * sign[:, None]
        lengths = norms(gram)
        directed = share.where(lengths > 0, 0.0)
        point = self._mean(cosines(gram), directed / directed.sum() if directed.any() else directed)
        on_deltas = (point * sign / lengths).where(lengths > 0, 0.0)
        return deltas.combine(on_deltas * float((share * lengths).sum()))

    def _mean(self, angles: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Return the coefficients ``(N,)`` of the mean on the unit vectors whose cosines are ``angles``."""
        start = length(angles, share)
        if start == 0:
            return torch.zeros_like(share)
        point = share / start
        for _ in range(self.max_iter):
            cosine = (angles @ point).clamp(-1.0, 1.0)
            sine = (1 - cosine.square()).sqrt()
            stretch = torch.where(sine > FLAT, cosine.acos() / sine.clamp(min=FLAT), 1.0)
            pull = share * stretch
            step = pull - (pull @ cosine) * point
            size = max(float(step @ angles @ step), 0.0) ** 0.5
            if size <= self.tol:
                break
            step_size = torch.tensor(size, dtype=torch.float64)
            point = step_size.cos() * point + step_size.sin() / size * step
        return point
