"""Routings as flat lists of decisions, for losses and metrics.

Shape letters: ``B`` rows, ``T`` tokens, ``E`` experts, ``N`` decisions.
"""

from __future__ import annotations

import torch

from compose.kernels.stack import LoraStack
from compose.routers.context import RoutingContext, agreed, repeat_rows
from compose.routers.routing import Decisions, Routing
from compose.routers.sites import Site


def decisions_of(
    site: Site,
    routing: Routing,
    context: RoutingContext,
    available_E: torch.Tensor,
    hidden: torch.Tensor | None,
    inputs: tuple[torch.Tensor | None, LoraStack] | None = None,
) -> Decisions:
    """Flatten a routing to one line per token, sequence or batch.

    Args:
        site: Where it was made.
        routing: Gates with leading dimensions ``()``, ``(B,)`` or ``(B, T)``.
        context: Masks, tasks and labels.
        available_E: Experts that exist at the site.
        hidden: What the gate saw, ``(B, T, D)``: for its rows and tokens.
        inputs: The leader's input and factors, where a loss reads them: then there is one line per token.
    """
    lead = tuple(routing.logits.shape[:-1])
    x, stack = inputs if inputs is not None else (None, None)
    if x is not None and len(lead) < x.dim() - 1:
        lead = tuple(x.shape[:-1])
    real, response = _masks(lead, context, routing.logits.device)
    return Decisions(
        site=site.name,
        layer=site.layer,
        logits_NE=_lines(routing.logits, lead),
        probs_NE=_lines(routing.probs, lead),
        gates_NE=_lines(_per_expert(routing), lead),
        real_N=real,
        response_N=response,
        tasks_N=_per_line(context.task_ids, lead, real.device),
        labels_N=_labels(context.expert_labels, lead, real.device),
        available_E=available_E,
        extras={name: _extra(value, routing, lead) for name, value in routing.extras.items()},
        x_ND=None if x is None else x.reshape(-1, x.shape[-1]),
        stack=stack,
        rows_N=_rows(lead, real.device),
    )


def _per_expert(routing: Routing) -> torch.Tensor:
    """Dense gates ``(..., E)``; of mixtures in splits their mean over splits."""
    gates, experts = routing.dense(), routing.probs.shape[-1]
    return gates if gates.shape[-1] == experts else gates.unflatten(-1, (-1, experts)).mean(-2)


def _lines(values: torch.Tensor, lead: tuple[int, ...]) -> torch.Tensor:
    """``(..., E)`` -> ``(N, E)``; fewer leading dimensions are repeated behind."""
    while values.dim() - 1 < len(lead):
        values = values.unsqueeze(-2)
    return values.expand(*lead, values.shape[-1]).reshape(-1, values.shape[-1])


def _extra(value: torch.Tensor, routing: Routing, lead: tuple[int, ...]) -> torch.Tensor:
    per_decision = value.dim() > 0 and value.shape[: routing.logits.dim() - 1] == routing.logits.shape[:-1]
    if not per_decision or routing.logits.dim() == 1:
        return value
    if value.dim() == routing.logits.dim() - 1:
        return _lines(value.unsqueeze(-1), lead).squeeze(-1)
    return _lines(value, lead)


def _masks(lead: tuple[int, ...], context: RoutingContext, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if len(lead) == 2:
        return context.real(*lead, device).reshape(-1), context.response(*lead, device).reshape(-1)
    ones = torch.ones(lead[0] if lead else 1, dtype=torch.bool, device=device)
    return ones, ones


def _per_line(values: torch.Tensor | None, lead: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Numbers ``(B,)`` as one per line; -1 where there are none or the batch decides as a whole."""
    lines = 1
    for size in lead:
        lines *= size
    if values is None or not lead:
        return torch.full((lines,), -1, dtype=torch.int64, device=device)
    rows = repeat_rows(values, lead[0]).to(device)
    return rows if len(lead) == 1 else rows.repeat_interleave(lead[1])


def _rows(lead: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Number of the batch row each line belongs to; one row where the batch decides as a whole."""
    if not lead:
        return torch.zeros(1, dtype=torch.int64, device=device)
    rows = torch.arange(lead[0], device=device)
    return rows if len(lead) == 1 else rows.repeat_interleave(lead[1])


def _labels(labels: torch.Tensor | None, lead: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if labels is None or labels.dim() == 1 or len(lead) != 2:
        per_row = labels if labels is None or labels.dim() == 1 else agreed(labels)
        return _per_line(per_row, lead, device)
    rows = repeat_rows(labels, lead[0]).to(device)
    if rows.shape[1] != lead[1]:
        return _per_line(agreed(labels), lead, device)
    return rows.reshape(-1)
