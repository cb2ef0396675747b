"""AdaMoLE's learned threshold on probabilities (arXiv:2405.00361).

Shape letters: ``D`` width of the gate's input, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.linear import initial
from compose.routers.selectors.top_p import keep
from compose.routers.side_input import per_decision, side_input, side_width
from compose.routers.steps import SELECTORS, Seen, Selected


@SELECTORS.register("threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Gates ``(p - τ)_+`` with ``τ(x) = maximum · sigmoid(w x + b)``; renormalise by ``sum``, as the paper.

    With ``maximum <= 1 / E`` and probabilities that sum to 1 the best expert is above τ. Where rounding, or
    probabilities that do not sum to 1, leave no expert, the best one takes part with its whole probability: upstream's
    output is 0 there. ``extras["threshold"]`` holds τ in the decisions' shape. ``w`` and ``b`` start as those of a
    linear layer do.

    Attributes:
        maximum: At most ``1 / E`` of the site's experts; None: that.
    """

    maximum: float | None = None

    def __post_init__(self) -> None:
        if self.maximum is not None and not 0 < self.maximum <= 1:
            raise IncompatibleError(f"maximum must lie in (0, 1], got {self.maximum}")

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the selector of one site.

        Raises:
            IncompatibleError: ``maximum`` is above ``1 / E`` here, or the gate reads nothing τ could depend on.
        """
        bound = 1 / max(1, int(shape.available_E.sum()))
        if self.maximum is not None and self.maximum > bound:
            raise IncompatibleError(
                f"threshold at {shape.name}: maximum {self.maximum} is above 1 / E = {bound:.4g}, so a decision could "
                "lose all its experts; lower it or leave it out"
            )
        width = side_width(shape, "the threshold")
        drawn = initial("kaiming", 1, width + 1, 0.0, shape.generator).squeeze(0) * ((width + 1) / width) ** 0.5
        return _Threshold(drawn, bound if self.maximum is None else self.maximum)


class _Threshold(nn.Module):
    def __init__(self, weight_and_bias: torch.Tensor, maximum: float) -> None:
        super().__init__()
        self.weight_D = nn.Parameter(weight_and_bias[:-1].clone())
        self.bias = nn.Parameter(weight_and_bias[-1].clone())
        self.maximum = maximum

    def forward(self, logits: torch.Tensor, probs: torch.Tensor, seen: Seen, available_E: torch.Tensor) -> Selected:
        """What probabilities have above the threshold."""
        x = side_input(seen, self.weight_D.shape[0], "the threshold").to(self.weight_D.dtype)
        threshold = per_decision(self.maximum * torch.sigmoid(x @ self.weight_D + self.bias), logits)
        selected = keep_above(logits, probs, threshold, available_E)
        return selected._replace(extras={"threshold": threshold})


def keep_above(
    logits: torch.Tensor, probs: torch.Tensor, threshold: torch.Tensor, available_E: torch.Tensor
) -> Selected:
    """``(p - τ)_+``; the best expert with its whole probability where that leaves none."""
    above = torch.relu(probs - threshold[..., None]).masked_fill(~available_E, 0)
    none = ~(above > 0).any(-1, keepdim=True)
    best = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[..., :1]
    rescued = none & torch.zeros_like(above, dtype=torch.bool).scatter(-1, best, True)
    return keep((above > 0) | rescued, logits, torch.where(rescued, probs, above))
