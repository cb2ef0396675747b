"""Mixer: how gates and experts meet at one target; every path ends in one low-rank product.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` in, ``O`` out, ``E`` experts, ``K`` chosen, ``R`` rank rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.kernels.lowrank import add_lowrank_, lowrank
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.stack import LoraStack, Spread
from compose.routers.routing import Routing
from compose.routers.spec import MixtureSpec


class Rows(NamedTuple):
    """Gates spread over rank rows once, for every target whose ranks and scalings are alike.

    Attributes:
        c: ``(B, 1, R)`` or ``(B, T, R)``, scalings included, in the dtype of the factors.
        lead: ``(B,)`` or ``(B, T)``: how often gates change.
        alike: See `compose.kernels.stack.Spread`.
    """

    c: torch.Tensor
    lead: torch.Size
    alike: tuple[tuple[int, ...], tuple[float, ...]]

    def are_of(self, stack: LoraStack) -> bool:
        """Whether gates spread over this stack's rows are the same."""
        spread = stack.spread()
        return spread is not None and (spread.alike is self.alike or spread.alike == self.alike)

    def fit(self, x: torch.Tensor, base: torch.Tensor | None) -> bool:
        """Whether they are for this input and base output; anything else is for the op to cast or refuse."""
        dtype = self.c.dtype
        tokens = x.ndim == 3 and x.shape[: len(self.lead)] == self.lead
        return tokens and x.dtype == dtype and (base is None or base.dtype == dtype)

    def add(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        """Return the base output plus the mixture, where they fit."""
        stack, base = call.stack, call.base
        if call.owns_base and not torch.is_grad_enabled() and x.is_contiguous() and base.is_contiguous():
            return add_lowrank_(base, x, stack.a_RD, stack.b_RO, self.c)
        return lowrank(x, stack.a_RD, stack.b_RO, self.c, base, reuse_base=call.owns_base)


class Mixer(nn.Module):
    """Applies a routing at a target.

    Attributes:
        spec: The mixture.
        structures: Target -> experts that are no stack of low-rank factors; empty where experts are the bank's.
        residuals: Target -> what is subtracted from the base output; empty unless the specification says so.
    """

    def __init__(
        self,
        spec: MixtureSpec,
        structures: Mapping[str, nn.Module] | None = None,
        residuals: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self._structure_of, self._residual_of = dict(structures or {}), dict(residuals or {})
        self.structures = nn.ModuleDict({key.replace(".", "/"): module for key, module in self._structure_of.items()})
        self.residuals = nn.ModuleDict({key.replace(".", "/"): module for key, module in self._residual_of.items()})
        own = self._structure_of or self._residual_of
        plain = (spec.combine, spec.structure, spec.expert_grad) == ("outputs", "lora", "plain")
        self._spreads = plain and not own

    def spread(self, routing: Routing, stack: LoraStack, backend: str) -> Rows | None:
        """The routing's rows for targets like that of ``stack``; None where `mixture_lora` has to choose how to mix.

        Chosen experts become dense gates where all rows together cost less than picking some.
        """
        spread, gates, ids = self.spread_of(stack, backend), routing.gates, routing.expert_ids
        if spread is None:
            return None
        lead = gates.shape[:-1]
        if not lead or gates.dtype != spread.matrix_RE.dtype or routing.probs.shape[-1] != spread.matrix_RE.shape[1]:
            return None
        if ids is None:
            c = nn.functional.linear(gates, spread.matrix_RE)
        elif spread.wide.shape[0] <= ROWS_PER_CHOICE * ids.shape[-1]:
            c = nn.functional.linear(routing.wide(ids), spread.wide)
        else:
            return None
        if c.dtype != stack.a_RD.dtype:
            c = c.to(stack.a_RD.dtype)
        return Rows(c if gates.ndim == 3 else c.unsqueeze(1), lead, spread.alike)

    def spread_of(self, stack: LoraStack, backend: str) -> Spread | None:
        """How gates become coefficients of a stack's rows; None where `mixture_lora` has to choose how to mix."""
        if not self._spreads or backend not in ("auto", "cpu"):
            return None
        spread = stack.spread()
        return spread if spread is not None and (spread.complete or self.spec.missing == "zero") else None

    def forward(self, x: torch.Tensor, call: Any, routing: Routing) -> torch.Tensor:
        """Return the base output plus the mixture: ``x (B, D)`` or ``(B, T, D)`` -> the same with ``O``."""
        structure = self.structure(call.target)
        if structure is not None:
            return structure(x, call, routing)
        gates, ids = self.fitted(routing, call.stack)
        _check_tokens(x, gates, call.target)
        residual = self.residual(call.target)
        if residual is not None:
            call = call._replace(base=residual(x, call))
        if self.spec.expert_grad == "sqrt_gate":
            return _sqrt_gate(x, call, gates, ids)
        return mixture_lora(
            x, call.stack, gates, ids,
            base=call.base, combine=self.spec.combine, backend=call.backend, reuse_base=call.owns_base,
        )  # fmt: skip

    def structure(self, target: str) -> nn.Module | None:
        """The target's own experts, where there are any."""
        return self._structure_of.get(target)

    def residual(self, target: str) -> nn.Module | None:
        """What is subtracted from the target's base output, where there is anything."""
        return self._residual_of.get(target)

    def fitted(self, routing: Routing, stack: LoraStack) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gates for one target: experts without factors here are masked, and the rest takes over their share.

        The sum of absolute gates stays: the plain sum of gates of both signs (`MixtureSpec.post`) may be near 0.
        """
        if self.spec.missing == "zero" or all(stack.ranks):
            return routing.gates, routing.expert_ids
        here_E = stack.present()
        here = here_E if routing.expert_ids is None else here_E[routing.expert_ids]
        kept = routing.gates * here
        total, rest = (each.abs().sum(-1, keepdim=True) for each in (routing.gates, kept))
        share = torch.where(rest > 1e-12, total / torch.where(rest == 0, torch.ones_like(rest), rest), 0.0)
        return kept * share, routing.expert_ids


ROWS_PER_CHOICE = 32
"""Up to so many rank rows per chosen expert, all rows together cost less than the chosen ones; see kernels/README."""


def _check_tokens(x: torch.Tensor, gates: torch.Tensor, target: str) -> None:
    if gates.dim() > x.dim() or (gates.dim() > 1 and gates.shape[:-1] != x.shape[: gates.dim() - 1]):
        raise IncompatibleError(
            f"{target}: gates {tuple(gates.shape)} do not fit the input {tuple(x.shape)}; "
            "route this target at a site of its own (site='linear') or leave it out (targets=...)"
        )


def _sqrt_gate(x: torch.Tensor, call: Any, gates: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """``√g E + (g - √g) E``, root and second ``E`` detached: the value is ``g E``, experts' gradients carry ``√g``."""
    root = gates.detach().clamp_min(0.0).sqrt()
    stack: LoraStack = call.stack
    frozen = LoraStack(stack.a_RD.detach(), stack.b_RO.detach(), stack.scaling_E, stack.ranks, stack.index)
    y = mixture_lora(x, stack, root, ids, base=call.base, backend=call.backend)
    return y + mixture_lora(x.detach(), frozen, gates - root, ids, backend=call.backend)
