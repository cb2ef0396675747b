"""The three steps of a gate and what they hand on: scores, probabilities, selection.

Each step is a registered dataclass of options whose ``build`` returns the module for one site:

- a gate network (`compose.routers.gates`): ``forward(seen) -> logits (..., E)``, float32;
- a normalisation (`compose.routers.normalisations`): ``forward(logits, seen, available_E) -> Normalised``;
- a selector (`compose.routers.selectors`): ``forward(logits, probs, seen, available_E) -> Selected``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from compose.kernels.stack import LoraStack
from compose.registry import Registry
from compose.routers.component import Component
from compose.routers.context import RoutingContext

GATES: Registry[type[Component]] = Registry("gate network", package="compose.routers.gates")
NORMALISATIONS: Registry[type[Component]] = Registry("normalisation", package="compose.routers.normalisations")
SELECTORS: Registry[type[Component]] = Registry("selector", package="compose.routers.selectors")


class Seen(NamedTuple):
    """What a gate sees in one forward.

    Attributes:
        x: ``(B, T, D)``, ``(B, D)`` (pooled over the prompt, or a layer without tokens); None where nothing is read.
        ids: int64 ``(B,)``: task or cluster numbers; None where the gate reads none.
        text: ``(B, D)`` or ``(B, T, D)``: text embeddings, which then are ``x`` too; None where the gate reads none.
        stack: Factors of the target that is being computed (the site's leader); None before any layer ran.
        context: The batch's context.
        training: Whether noise and dropout of gates apply.
        prompt: ``(B, D)``: the prompt's embeddings as one vector, for gates per token that read it too
            (``reads_prompt``).
    """

    x: torch.Tensor | None
    ids: torch.Tensor | None
    text: torch.Tensor | None
    stack: LoraStack | None
    context: RoutingContext
    training: bool
    prompt: torch.Tensor | None = None


class Normalised(NamedTuple):
    """What a normalisation made of the scores.

    Attributes:
        probs: ``(..., E)`` float32.
        extras: What losses may want to see of how they came about.
        scores: ``(..., E)``: the scores as selection and renormalisation take them: at the normalisation's
            temperature, where it has one; None: as they were.
    """

    probs: torch.Tensor
    extras: Mapping[str, torch.Tensor] = {}
    scores: torch.Tensor | None = None


class Selected(NamedTuple):
    """Gates before renormalisation: ``(..., E)``, or ``(..., K)`` with ids; not selected entries of dense gates are 0.

    Attributes:
        gates: float32.
        expert_ids: int64 ``(..., K)``, distinct per decision, or None.
        logits: The scores of the gates' experts, in the gates' shape, ``-inf`` where nothing was selected.
        extras: See `Normalised`.
    """

    gates: torch.Tensor
    expert_ids: torch.Tensor | None
    logits: torch.Tensor
    extras: Mapping[str, torch.Tensor] = {}


def masked(logits: torch.Tensor, available_E: torch.Tensor) -> torch.Tensor:
    """Scores with ``-inf`` for experts that a site does not have."""
    return logits.masked_fill(~available_E.to(logits.device), float("-inf"))
