"""Siblings: targets that read the same input (q, k and v; gate and up) are mixed together when the first is called.

With single tokens a layer takes as long as its operators and calls take, whatever they compute. Where every sibling
has a soft gate of its own (`compose.routers.soft`) one decision serves them all, and where their factors lie side by
side in memory, as `compose.bank` puts them, they share the product with ``A``. Which targets are siblings is seen in
the first forward: they are called one after the other with the same tensor. An only child with a gate is a family too.

Only on a CPU, without autograd and outside of inference mode. Nothing is copied or kept from forward to forward: gates
and factors are read as they are.

Shape letters: ``B`` rows, ``T`` tokens, ``N`` all tokens, ``S`` siblings, ``D`` width of their input, ``E`` experts,
``R`` rank rows of one sibling.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compose.kernels.lowrank import add_lowrank_
from compose.kernels.side_by_side import adjoining
from compose.kernels.stack import LoraStack, Spread
from compose.routers.gates.linear import LinearScores
from compose.routers.lanes import Lane
from compose.routers.mixing import Mixer, Rows
from compose.routers.router import SiteRouter


class _Pending:
    """What a leader's call found for its siblings.

    Attributes:
        x: Their input.
        of: Targets that were not called yet -> place.
        stacks: Their factors.
        weights: Their gates' weights; None where they were not asked.
        c: Per place coefficients of the rank rows, ``(B, 1 or T, R)``; empty where ``z`` is.
        a_RD: All A's in one, where they are; else the products are still to be made.
        z: Per place ``(N, R)``, to be multiplied with B, where ``a_RD`` is.
    """

    __slots__ = ("a_RD", "a_version", "c", "of", "stacks", "version", "weight_versions", "weights", "x", "z")

    def __init__(
        self, x: torch.Tensor, of: dict[str, int], stacks: Sequence[LoraStack], weights: Sequence[torch.Tensor] | None
    ) -> None:
        self.x, self.version, self.of, self.stacks = x, x._version, of, stacks
        self.weights = weights
        self.weight_versions = None if weights is None else [weight._version for weight in weights]
        self.a_RD: torch.Tensor | None = None
        self.a_version = 0
        self.c: Sequence[torch.Tensor] = ()
        self.z: Sequence[torch.Tensor] = ()

    def take(self, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        """Add a target's mixture to its base output; None where that was not computed for this call."""
        place = self.of.get(call.target)
        if place is None or self.x is not x or x._version != self.version or not _plain(x, call):
            return None
        if call.stack is not self.stacks[place]:
            return None
        if self.weights is not None and self.weights[place]._version != self.weight_versions[place]:  # type: ignore[index]
            return None
        if self.a_RD is not None and self.a_RD._version != self.a_version:
            return None
        return self.add(x, call, place)

    def add(self, x: torch.Tensor, call: Any, place: int) -> torch.Tensor:
        """Add the mixture of the target at ``place``, which is called with ``x``."""
        del self.of[call.target]
        if self.a_RD is None:
            return add_lowrank_(call.base, x, call.stack.a_RD, call.stack.b_RO, self.c[place])
        return _expand(call, self.z[place])


class Family:
    """Targets with one input, the leader first.

    Attributes:
        targets: The siblings.
        sites: Their gates; None where they are of one site, which was decided before.
    """

    def __init__(
        self,
        targets: Sequence[str],
        layers: Sequence[Any],
        spreads: Sequence[Spread],
        sites: Sequence[SiteRouter] | None,
    ) -> None:
        self.targets, self.sites = tuple(targets), sites
        self._places = {target: place for place, target in enumerate(targets)}
        self._layers, self._spreads = layers, spreads
        self._a_RD: torch.Tensor | None = None
        self._a_places: list[int] = []

    def alone(self, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        """The mixture of an only child; None as for `lead`."""
        stack, found = call.stack, self._gates([call.stack], x)
        if found is None:
            return None
        x_ND = x.view(-1, x.shape[-1])
        h_NR = nn.functional.linear(x_ND, stack.a_RD)
        return _expand(call, h_NR.mul_(self._coefficients(x_ND, *found)))

    def lead(self, x: torch.Tensor, rows: Rows | None) -> _Pending | None:
        """What the siblings have to add for ``x (B, T, D)``; None where they are not alike now, or not for this input.

        Args:
            x: Their input.
            rows: What was decided for all of them; None where each has a gate.
        """
        stacks = [layer.stack for layer in self._layers]
        found = self._gates(stacks, x)
        if found is None:
            return None
        pending = _Pending(x, dict(self._places), stacks, found[0] if self.sites is not None else None)
        a_RD, count = self._together(stacks), len(stacks)
        x_ND = x.view(-1, x.shape[-1])
        if rows is None:
            c = self._coefficients(x_ND, *found)
        elif a_RD is None:
            pending.c = [rows.c] * count
            return pending
        if a_RD is None:
            pending.c = c.view(*x.shape[:-1], -1).chunk(count, dim=-1)
            return pending
        h_NR = nn.functional.linear(x_ND, a_RD)
        if rows is None:
            h_NR.mul_(c)
        else:
            h_NR.view(*x.shape[:-1], count, -1).mul_(rows.c.unsqueeze(2))
        pending.a_RD, pending.a_version, pending.z = a_RD, a_RD._version, h_NR.chunk(count, dim=1)
        return pending

    def _gates(
        self, stacks: Sequence[LoraStack], x: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        """Weights and biases (one per site, or none) as they are now; none at all where sites were decided before.

        None where siblings are not alike, or do not read ``x`` as it is.
        """
        dtype = x.dtype
        for stack, spread in zip(stacks, self._spreads, strict=True):
            if stack.spread() is not spread or stack.a_RD.dtype != dtype or stack.a_RD.is_inference():
                return None
        weights: list[torch.Tensor] = []
        biases: list[torch.Tensor] = []
        if self.sites is None:
            return weights, biases
        first = self.sites[0].soft
        for site in self.sites:
            gate, soft = site._modules["gate"], site.soft  # by attribute they run torch's Python look-up
            if soft is None or first is None or type(gate) is not LinearScores:
                return None
            weight_ED, bias_E = gate._parameters.get("weight_ED"), gate._parameters.get("bias_E")
            if weight_ED is None or weight_ED.dtype != dtype or weight_ED.shape[0] != site.num_experts:
                return None
            if weight_ED.is_inference() or not (soft is first or soft.like(first)):
                return None
            weights.append(weight_ED)
            if bias_E is not None:
                biases.append(bias_E)
        return (weights, biases) if len(biases) in (0, len(weights)) else None

    def _coefficients(
        self, x_ND: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """``(N, S R)``: gates spread over the siblings' rank rows."""
        assert self.sites is not None  # noqa: S101 - they are whose gates these are
        one, soft, matrix_RE = len(weights) == 1, self.sites[0].soft, self._spreads[0].matrix_RE
        assert soft is not None  # noqa: S101 - _gates
        bias = None if not biases else biases[0] if one else torch.cat(biases)  # type: ignore[arg-type]
        logits = nn.functional.linear(x_ND, weights[0] if one else torch.cat(weights), bias)  # type: ignore[arg-type]
        if one:
            return nn.functional.linear(soft.dense(logits), matrix_RE)
        gates = soft.dense(logits.view(-1, matrix_RE.shape[1]))
        return nn.functional.linear(gates, matrix_RE).view(len(x_ND), -1)

    def _together(self, stacks: Sequence[LoraStack]) -> torch.Tensor | None:
        """All A's in one, where they lie so."""
        places = [stack.a_RD.data_ptr() for stack in stacks]
        if places != self._a_places:
            self._a_RD, self._a_places = adjoining([stack.a_RD for stack in stacks]), places
        return self._a_RD


class _State(threading.local):
    """What one thread has open."""

    pending: _Pending | None = None
    last: torch.Tensor | None = None
    run: tuple[str, ...] = ()
    """Targets called with ``last``, one after the other."""


class Families:
    """The siblings of one attached model, as far as they were seen."""

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        gates: Mapping[str, SiteRouter],
        layers: Mapping[str, Any],
        mixer: Mixer,
        backend: str,
    ) -> None:
        self._lanes, self._gates, self._layers, self._mixer, self._backend = lanes, gates, layers, mixer, backend
        self._of: dict[str, Family | None] = {}
        self._here = _State()

    def take(self, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        """The mixture of a target whose leader was called with this input; None where there is none."""
        pending = self._here.pending
        return None if pending is None else pending.take(x, call)

    def lead(self, x: torch.Tensor, call: Any, rows: Rows | None = None) -> torch.Tensor | None:
        """The mixture of a leader: by the gates of its family, or by rows decided for all of it; None where not so.

        Calls of targets that are not known yet are watched.
        """
        family = self._of.get(call.target, _UNSEEN)
        if family is _UNSEEN:
            self._watch(x, call.target)
            return None
        if family is None or family.targets[0] != call.target or (family.sites is None) == (rows is None):
            return None
        if not _plain(x, call):
            return None
        if len(family.targets) == 1:
            mixed = family.alone(x, call)
        else:
            self._here.pending = pending = family.lead(x, rows)
            mixed = None if pending is None else pending.add(x, call, 0)
        if mixed is None:
            for target in family.targets:
                self._of.pop(target, None)
        return mixed

    def forget(self) -> None:
        """Let go of inputs: at the end of a forward, or where decisions are to be seen or changed."""
        self._close()
        self._here.pending = None

    def clear(self) -> None:
        """Forget the families too."""
        self.forget()
        self._of.clear()

    def _watch(self, x: torch.Tensor, target: str) -> None:
        here = self._here
        if x is here.last and here.run[-1] == target:
            return
        if x is not here.last or target in here.run:
            self._close()
            here.last = x
        here.run = (*here.run, target)

    def _close(self) -> None:
        here = self._here
        run, here.run, here.last = here.run, (), None
        if run:
            self._of.update(dict.fromkeys(run, self._family(run)))

    def _family(self, targets: Sequence[str]) -> Family | None:
        """Siblings whose ranks, scalings and ways of deciding are alike; else None."""
        lanes, layers = [self._lanes[target] for target in targets], [self._layers[target] for target in targets]
        spreads = [self._mixer.spread_of(layer.stack, self._backend) for layer in layers]
        alike = [
            spread for spread in spreads if spread is not None and spreads[0] and spread.alike == spreads[0].alike
        ]
        if len(alike) < len(targets):
            return None
        if all(lane.alone and lane.decides and not lane.of_encoder for lane in lanes):
            sites = [self._gates[lane.site.name] for lane in lanes]
            rows, experts = alike[0].matrix_RE.shape
            fit = all(site.soft is not None and site.soft.mixes_all(rows) for site in sites)
            return Family(targets, layers, alike, sites) if fit and sites[0].num_experts == experts else None
        shared = all(lane.site is lanes[0].site for lane in lanes) and not any(lane.decides for lane in lanes[1:])
        return Family(targets, layers, alike, None) if shared and len(targets) > 1 else None


_UNSEEN: Any = object()


def _expand(call: Any, z_NR: torch.Tensor) -> torch.Tensor:
    """Add ``z B`` to the base output."""
    base, b_RO = call.base, call.stack.b_RO
    base.view(-1, b_RO.shape[1]).addmm_(z_NR, b_RO)
    return base


def _plain(x: torch.Tensor, call: Any) -> bool:
    """Whether a base output can be added to in place, without autograd; ``x`` is of no inference mode."""
    base = call.base
    if torch.is_grad_enabled() or not call.owns_base or x.ndim != 3 or base.dtype != x.dtype:
        return False
    return base.is_contiguous() and x.is_contiguous() and not base.is_inference()
