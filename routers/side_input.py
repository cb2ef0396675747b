"""The input of side networks of a gate: what a threshold or a sparsity factor is computed from."""

from __future__ import annotations

import torch

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.steps import Seen


def side_width(shape: SiteShape, who: str) -> int:
    """Width of the input of a side network.

    Raises:
        IncompatibleError: The site's gate reads nothing.
    """
    if shape.in_features < 1:
        raise IncompatibleError(
            f"{who} at {shape.name} depends on what the gate reads, and this gate reads no vectors; "
            "choose a gate_input of hidden states or text"
        )
    return shape.in_features


def side_input(seen: Seen, width: int, who: str) -> torch.Tensor:
    """Hidden states ``(..., D)``, or text embeddings where there are none.

    Raises:
        IncompatibleError: Neither is there, or it is of another width than the gate's.
    """
    x = seen.text if seen.x is None else seen.x
    if x is None or x.shape[-1] != width:
        given = "nothing" if x is None else f"width {x.shape[-1]}"
        raise IncompatibleError(f"{who} was built for inputs of width {width}, the gate reads {given}")
    return x


def per_decision(values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """One value per input, in the leading shape of the scores (splits of a decision share it)."""
    while values.dim() < logits.dim() - 1:
        values = values.unsqueeze(-1)
    return values.to(logits.dtype).expand(logits.shape[:-1])
