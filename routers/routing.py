"""Routing and Decisions: what a router decided, as the layers use it and as losses and metrics read it.

Shape letters: ``B`` rows, ``T`` tokens, ``E`` experts, ``K`` chosen, ``N`` decisions, ``R`` rank rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from compose.kernels.stack import LoraStack


class Routing(NamedTuple):
    """Gates of one site for one forward; leading dimensions ``()``, ``(B,)`` or ``(B, T)`` say how often they change.

    Attributes:
        gates: float32 ``(..., E)``, or ``(..., K)`` with ``expert_ids``.
        expert_ids: int64 ``(..., K)``: the experts the gates belong to; None: all, in the bank's order.
        logits: float32 ``(..., E)``: the gate network's scores; ``-inf`` for experts the site does not have.
        probs: float32 ``(..., E)``: after normalisation, before selection.
        extras: What a component wants its losses to see, by name (a threshold, a sparsity factor).
    """

    gates: torch.Tensor
    expert_ids: torch.Tensor | None
    logits: torch.Tensor
    probs: torch.Tensor
    extras: Mapping[str, torch.Tensor] = {}

    def dense(self) -> torch.Tensor:
        """Gates ``(..., E)``, 0 for experts that were not selected."""
        return self.gates if self.expert_ids is None else self.wide(self.expert_ids)[..., 1:]

    def wide(self, expert_ids: torch.Tensor) -> torch.Tensor:
        """`dense` with a place more in front, for what has no expert: ``(..., 1 + E)``; ids are the routing's own."""
        empty = self.gates.new_zeros(*self.gates.shape[:-1], 1 + self.probs.shape[-1])
        return empty.scatter_add_(-1, expert_ids + 1, self.gates)


class Decisions(NamedTuple):
    """The decisions of one site in one forward, flattened: one line per token, sequence or (static gates) batch.

    Attributes:
        site: Name of the site.
        layer: Its layer number, -1 for a site of the whole model.
        logits_NE: See `Routing`.
        probs_NE: See `Routing`.
        gates_NE: Dense gates.
        real_N: bool: False for padding.
        response_N: bool: True for tokens of the response; equals ``real_N`` where nobody said.
        tasks_N: int64 task numbers; -1 where unknown.
        labels_N: int64: the expert each decision should name; -1 where unknown.
        available_E: bool: experts that exist at this site.
        extras: ``(N, ...)`` or scalar tensors of the components.
        x_ND: The inputs of the site's first target (detached from nothing), kept only where a loss asks for them.
        stack: Factors of the site's first target, kept with ``x_ND``.
        rows_N: int64: the batch row each decision belongs to; None: each is a row of its own.
    """

    site: str
    layer: int
    logits_NE: torch.Tensor
    probs_NE: torch.Tensor
    gates_NE: torch.Tensor
    real_N: torch.Tensor
    response_N: torch.Tensor
    tasks_N: torch.Tensor
    labels_N: torch.Tensor
    available_E: torch.Tensor
    extras: Mapping[str, torch.Tensor] = {}
    x_ND: torch.Tensor | None = None
    stack: LoraStack | None = None
    rows_N: torch.Tensor | None = None
