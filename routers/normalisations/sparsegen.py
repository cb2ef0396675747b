"""Sparsegen with a learned sparsity per decision (LD-MoLE, arXiv:2509.25684).

Shape letters: ``D`` width of the gate's input, ``E`` experts, ``H`` hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.linear import initial
from compose.routers.side_input import per_decision, side_input, side_width
from compose.routers.steps import NORMALISATIONS, Normalised, Seen


@NORMALISATIONS.register("sparsegen")
@dataclass(frozen=True, kw_only=True)
class Sparsegen:
    """``p = [z - τ(z)]_+ / (1 - λ)`` with the τ for which p sums to 1; λ(x) comes from a small network.

    ``argmin |p - z|² - λ |p|²`` over the simplex: λ near 1 keeps one expert, λ -> -inf all, 0 is sparsemax.
    ``λ = logsigmoid(W2 relu(W1 x + b1) + b2) + maximum``, below ``maximum < 1``; so the best expert of a decision
    always takes part. ``extras["lambda"]`` holds λ in the decisions' shape. As upstream, one network serves all sites
    whose inputs have the same width, and biases start at -2.5.

    Attributes:
        hidden: H.
        maximum: Bound of λ, below 1; 0.99 upstream.
        shared: One network per input width for all sites, as the paper; otherwise one per site.
        fixed: This λ for every decision, and no network.
    """

    hidden: int = 64
    maximum: float = 0.99
    shared: bool = True
    fixed: float | None = None

    def __post_init__(self) -> None:
        if self.hidden < 1 or not self.maximum < 1 or (self.fixed is not None and not self.fixed < 1):
            raise IncompatibleError(
                "hidden must be at least 1, and maximum and fixed below 1; "
                f"got {self.hidden}, {self.maximum}, {self.fixed}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the normalisation of one site.

        Raises:
            IncompatibleError: The gate reads nothing that λ could depend on.
        """
        return _Sparsegen(None if self.fixed is not None else self._network(shape), self.fixed)

    def _network(self, shape: SiteShape) -> _Lambda:
        width = side_width(shape, "sparsegen's λ")
        key = f"sparsegen/{width}/{self.hidden}/{self.maximum}"
        shared = shape.shared if self.shared else None
        network = shared.get(key) if shared is not None else None
        if not isinstance(network, _Lambda):
            network = _Lambda(width, self.hidden, self.maximum, shape.generator)
        if shared is not None:
            shared[key] = network
        return network


class _Lambda(nn.Module):
    def __init__(self, width: int, hidden: int, maximum: float, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.maximum = width, maximum
        self.weight_HD = nn.Parameter(initial("kaiming", hidden, width, 0.0, generator))
        self.bias_H = nn.Parameter(torch.full((hidden,), -2.5))
        self.out_H = nn.Parameter(initial("kaiming", 1, hidden, 0.0, generator).squeeze(0))
        self.out_bias = nn.Parameter(torch.tensor(-2.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x (..., D)`` -> λ ``(...)``."""
        hidden = torch.relu(nn.functional.linear(x.to(self.weight_HD.dtype), self.weight_HD, self.bias_H))
        return nn.functional.logsigmoid(hidden @ self.out_H + self.out_bias) + self.maximum


class _Sparsegen(nn.Module):
    def __init__(self, network: _Lambda | None, fixed: float | None) -> None:
        super().__init__()
        self.network = network
        self.fixed = fixed

    def forward(self, logits: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Normalised:
        """Scores, ``-inf`` for missing experts -> probabilities, and λ."""
        if self.network is None:
            sparsity = logits.new_full(logits.shape[:-1], self.fixed or 0.0)
        else:
            x = side_input(seen, self.network.width, "sparsegen's λ")
            sparsity = per_decision(self.network(x), logits)
        return Normalised(sparsegen(logits, sparsity), {"lambda": sparsity})


def sparsegen(logits: torch.Tensor, sparsity: torch.Tensor) -> torch.Tensor:
    """Project scores onto the simplex (Laha et al., 2018).

    Args:
        logits: ``(..., E)``; ``-inf`` takes no part.
        sparsity: λ ``(...)``, below 1.

    Returns:
        ``(..., E)``, >= 0, sum 1.
    """
    shifted = logits - logits.detach().amax(-1, keepdim=True)  # no change but to rounding: scores may be large
    free = (1 - sparsity)[..., None]
    ordered = torch.sort(shifted, dim=-1, descending=True).values
    places = torch.arange(1, ordered.shape[-1] + 1, device=logits.device)
    sums = ordered.cumsum(-1)
    inside = (free + places * ordered > sums) & (ordered > float("-inf"))
    kept = torch.where(inside, ordered, 0).sum(-1, keepdim=True)
    threshold = (kept - free) / inside.sum(-1, keepdim=True)
    return torch.relu(shifted - threshold) / free
