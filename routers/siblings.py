"""Siblings: targets that read the same input (q, k and v; gate and up) are mixed together when the first is called.

With single tokens a layer takes as long as its operators and calls take, whatever they compute. Where every sibling
has a soft gate of its own (`compose.routers.soft`) one decision serves them all, and where their factors lie side by
side in memory, as `compose.bank` puts them, they share the product with ``A``. Which targets are siblings is seen in
the first forward: they are called one after the other with the same tensor. An only child with a gate is a family too.

Only on a CPU and without autograd. Nothing is copied or kept from forward to forward: gates and factors are read as
they are. An input that was written to between two calls is another one. In inference mode tensors do not know that:
there siblings share what stayed as it was in the first forward, inside of a model's forward, if no layer has hooks.

Shape letters: ``B`` rows, ``T`` tokens, ``N`` all tokens, ``S`` siblings, ``D`` width of their input, ``E`` experts,
``R`` rank rows of one sibling.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from compose.kernels.lowrank import add_lowrank_
from compose.kernels.side_by_side import adjoining
from compose.kernels.stack import LoraStack, Spread
from compose.kernels.watched import Unwatched
from compose.routers.gates.linear import LinearScores
from compose.routers.lanes import Lane
from compose.routers.mixing import Mixer, Rows
from compose.routers.router import SiteRouter
from compose.routers.soft import SoftGates


class _Pending:
    """What a leader's call found for its siblings.

    Attributes:
        x: Their input.
        version: Of ``x``.
        of: Targets that were not called yet -> place.
        stacks: Their factors.
        weights: Their gates' weights; none where they were not asked.
        weight_versions: Of these.
        c: Per place coefficients of the rank rows, ``(B, 1 or T, R)``; empty where ``z`` is.
        a_RD: All A's in one, where they are; else the products are still to be made.
        a_version: Of ``a_RD``.
        z: Per place ``(N, R)``, to be multiplied with ``alpha`` B, where ``a_RD`` is.
    """

    __slots__ = (
        "a_RD", "a_version", "alpha", "c", "of", "stacks", "version", "weight_versions", "weights", "x", "z",
    )  # fmt: skip

    def __init__(
        self, x: torch.Tensor, of: dict[str, int], stacks: Sequence[LoraStack], weights: Sequence[torch.Tensor]
    ) -> None:
        self.x, self.version, self.of, self.stacks = x, _version(x), of, stacks
        self.weights, self.weight_versions = weights, [weight._version for weight in weights]
        self.a_RD: torch.Tensor | None = None
        self.a_version, self.alpha = 0, 1.0
        self.c: Sequence[torch.Tensor] = ()
        self.z: Sequence[torch.Tensor] = ()

    def take(self, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        """Add a target's mixture to its base output; None where that was not computed for this call."""
        place, base = self.of.get(call.target), call.base
        if place is None or x is not self.x or _version(x) != self.version or call.stack is not self.stacks[place]:
            return None
        if not call.owns_base or torch.is_grad_enabled() or base.dtype is not x.dtype or not base.is_contiguous():
            return None
        if self.weights and self.weights[place]._version != self.weight_versions[place]:
            return None
        if self.a_RD is not None and self.a_RD._version != self.a_version:
            return None
        return self.add(x, call, place)

    def add(self, x: torch.Tensor, call: Any, place: int) -> torch.Tensor:
        """Add the mixture of the target at ``place``, which is called with ``x``."""
        del self.of[call.target]
        if self.a_RD is None:
            return add_lowrank_(call.base, x, call.stack.a_RD, call.stack.b_RO, self.c[place])
        return _expand(call, self.z[place], self.alpha)


class _Known(NamedTuple):
    """What was found of one sibling; it holds as long as its parts are the same objects.

    Attributes:
        layer: Its composed layer.
        stack: The factors.
        scaling_E: The stack's.
        version: Of ``scaling_E``.
        modules: The site's modules; this and what follows is None where the site was decided before.
        gate: The site's gate.
        parameters: The gate's.
        weight_ED: One of them.
        bias_E: Another, or None.
    """

    layer: Any
    stack: LoraStack
    scaling_E: torch.Tensor
    version: int
    modules: Any
    gate: Any
    parameters: Any
    weight_ED: Any
    bias_E: Any

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether nothing was replaced."""
        layer, stack, scaling_E, version, modules, gate, parameters, weight_ED, bias_E = self
        if layer._stack is not stack or scaling_E._version != version or stack.a_RD.dtype is not dtype:
            return False
        if modules is None:
            return True
        same = modules["gate"] is gate and parameters.get("weight_ED") is weight_ED
        return same and parameters.get("bias_E") is bias_E and weight_ED.dtype is dtype


class Family:
    """Targets with one input, the leader first.

    Attributes:
        targets: The siblings.
        sites: Their gates; None where they are of one site, whose decision is handed over.
        before: Name of that site, where it decides before the leader is called.
        alike: Ranks and scalings.
    """

    def __init__(
        self,
        targets: Sequence[str],
        layers: Sequence[Any],
        spreads: Sequence[Spread],
        sites: Sequence[SiteRouter] | None,
        before: str | None = None,
    ) -> None:
        self.targets, self.sites, self.before, self.alike = tuple(targets), sites, before, spreads[0].alike
        self._places = {target: place for place, target in enumerate(targets)}
        self._layers, self._spreads = layers, spreads
        self._known: list[_Known] = []
        self._stacks: list[LoraStack] = []
        self._weights: list[torch.Tensor] = []
        self._biases: list[torch.Tensor] = []
        self._a_RD: torch.Tensor | None = None
        self._a_places: list[int] = []

    def alone(self, x: torch.Tensor, call: Any, rows: Rows | None) -> torch.Tensor | None:
        """The mixture of an only child; arguments and None as for `lead`."""
        if rows is not None:
            stack = call.stack
            return add_lowrank_(call.base, x, stack.a_RD, stack.b_RO, rows.c) if self._alike(x.dtype) else None
        soft = self._soft(x.dtype)
        if soft is None:
            return None
        x_ND = x.view(-1, x.shape[-1])
        h_NR = nn.functional.linear(x_ND, call.stack.a_RD)
        return _expand(call, h_NR, self._weigh(h_NR, self._gates(x_ND, soft)))

    def lead(self, x: torch.Tensor, rows: Rows | None) -> _Pending | None:
        """What the siblings have to add for ``x (B, T, D)``; None where they are not alike now, or not for this input.

        Args:
            x: Their input.
            rows: What was decided for all of them; None where each has a gate.
        """
        soft = None if rows is not None else self._soft(x.dtype)
        if soft is None and (rows is None or not self._alike(x.dtype)):
            return None
        pending, count = _Pending(x, dict(self._places), self._stacks, self._weights), len(self._stacks)
        a_RD = self._together()
        if a_RD is None:
            pending.c = self._coefficients(x, soft) if soft is not None else [rows.c] * count  # type: ignore[union-attr]
            return pending
        x_ND = x.view(-1, x.shape[-1])
        h_NR = nn.functional.linear(x_ND, a_RD)
        if soft is not None:
            pending.alpha = self._weigh(h_NR, self._gates(x_ND, soft))
        else:
            h_NR.view(*x.shape[:-1], count, -1).mul_(rows.c.unsqueeze(2))  # type: ignore[union-attr]
        pending.a_RD, pending.a_version = a_RD, a_RD._version
        pending.z = h_NR.split_with_sizes([a_RD.shape[0] // count] * count, 1)
        return pending

    def _alike(self, dtype: torch.dtype) -> bool:
        """Whether siblings are alike now, and read inputs of a type as they are."""
        known = self._known
        return (bool(known) and all(one.holds(dtype) for one in known)) or self._look(dtype)

    def _look(self, dtype: torch.dtype) -> bool:
        """Find the siblings' parts anew; False where they are not alike."""
        self._known = []
        known = []
        for place, (layer, spread) in enumerate(zip(self._layers, self._spreads, strict=True)):
            stack = layer.stack
            if stack.spread() is not spread or stack.a_RD.dtype is not dtype or stack.a_RD.is_inference():
                return False
            of_gate: tuple[Any, ...] = (None,) * 5
            if self.sites is not None:
                site = self.sites[place]
                gate = site._modules["gate"]  # by attribute it runs torch's Python look-up
                if site.soft is None or type(gate) is not LinearScores or gate.layer_norm:
                    return False
                weight_ED, bias_E = gate._parameters.get("weight_ED"), gate._parameters.get("bias_E")
                if weight_ED is None or weight_ED.dtype is not dtype or weight_ED.shape[0] != site.num_experts:
                    return False
                if weight_ED.is_inference():
                    return False
                of_gate = (site._modules, gate, gate._parameters, weight_ED, bias_E)
            known.append(_Known(layer, stack, stack.scaling_E, stack.scaling_E._version, *of_gate))
        self._stacks = [one.stack for one in known]
        self._weights = [one.weight_ED for one in known if one.modules is not None]
        self._biases = [one.bias_E for one in known if one.bias_E is not None]
        if len(self._biases) not in (0, len(known)):
            return False
        self._known = known
        return True

    def _soft(self, dtype: torch.dtype) -> SoftGates | None:
        """How all siblings decide now; None where not alike."""
        sites = self.sites
        if sites is None or not self._alike(dtype):
            return None
        soft = sites[0].soft
        assert soft is not None  # noqa: S101 - _look
        for site in sites:
            if site.soft is not soft and not (site.soft is not None and site.soft.like(soft)):
                return None
        return soft

    def _gates(self, x_ND: torch.Tensor, soft: SoftGates) -> torch.Tensor:
        """``(N S, E)``: every sibling's gates."""
        weights, biases = self._weights, self._biases
        if len(weights) == 1:
            return soft.dense(nn.functional.linear(x_ND, weights[0], biases[0] if biases else None))
        logits = nn.functional.linear(x_ND, torch.cat(weights), torch.cat(biases) if biases else None)
        return soft.dense(logits.view(-1, weights[0].shape[0]))

    def _weigh(self, h_NR: torch.Tensor, gates: torch.Tensor) -> float:
        """Multiply the siblings' rank rows ``(N, S R)`` by their gates, in place; return what is left to multiply."""
        spread = self._spreads[0]
        if spread.even is None:
            h_NR.mul_(nn.functional.linear(gates, spread.matrix_RE).view_as(h_NR))
            return 1.0
        rank, scaling = spread.even
        count, experts = gates.shape
        h_NR.view(count, experts, rank).mul_(gates.view(count, experts, 1))
        return scaling

    def _coefficients(self, x: torch.Tensor, soft: SoftGates) -> Sequence[torch.Tensor]:
        """Per sibling ``(B, T, R)``: gates spread over rank rows."""
        c = nn.functional.linear(self._gates(x.view(-1, x.shape[-1]), soft), self._spreads[0].matrix_RE)
        return c.view(*x.shape[:-1], -1).chunk(len(self._stacks), dim=-1)

    def _together(self) -> torch.Tensor | None:
        """All A's in one, where they lie so."""
        places = [stack.a_RD.data_ptr() for stack in self._stacks]
        if places != self._a_places:
            self._a_RD, self._a_places = adjoining([stack.a_RD for stack in self._stacks]), places
        return self._a_RD


class _State(threading.local):
    """What one thread has open."""

    quick = False
    unversioned = False
    """Whether siblings may share inputs that do not know how often they were written to."""
    pending: _Pending | None = None
    last: torch.Tensor | None = None
    state: Any = None
    """Of ``last``, when it was first seen: its version, or a copy where it has none."""
    run: tuple[str, ...] = ()
    """Targets called with ``last``, one after the other."""


class Families:
    """The siblings of one attached model, as far as they were seen.

    Args:
        lanes: Of all routed targets.
        gates: Site -> gate.
        layers: Target -> composed layer.
        decided: Site -> what has rows, where it was decided; read when a leader is called.
        mixer: How gates meet experts.
        backend: Of the layers.
        unwatched: Whether nobody watches the gates.
        reads_tokens: Whether gates read the tokens of layers, one by one.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        gates: Mapping[str, SiteRouter],
        layers: Mapping[str, Any],
        decided: Mapping[str, Any],
        mixer: Mixer,
        backend: str,
        *,
        unwatched: Callable[[], bool],
        reads_tokens: bool,
    ) -> None:
        self._lanes, self._gates, self._layers, self._mixer, self._backend = lanes, gates, layers, mixer, backend
        self._decided, self._unwatched, self._reads_tokens = decided, unwatched, reads_tokens
        self._unwatched_layers = Unwatched(nn.ModuleList(layers.values()))
        self._of: dict[str, Family | None] = {}
        self._here = _State()

    def begin(self, *, quick: bool) -> None:
        """A forward of a body begins; ``quick``: nothing in it is traced, cast or watched."""
        self.forget()
        here = self._here
        here.quick = quick
        # hooks on layers may write to an input, of which it knows nothing in inference mode
        here.unversioned = quick and torch.is_inference_mode_enabled() and self._unwatched_layers()

    def take(self, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        """The mixture of a target whose leader was called with this input, or in a quick forward of a leader.

        None where it is neither.
        """
        here = self._here
        pending = here.pending
        if pending is not None and (here.unversioned or not x.is_inference()):
            mixed = pending.take(x, call)
            if mixed is not None:
                return mixed
        family = self._of.get(call.target) if here.quick and self._unwatched() else None
        if family is None or family.targets[0] != call.target:
            return None
        if family.sites is not None:
            return self._lead(family, x, call, None)
        decided = None if family.before is None else self._decided.get(family.before)
        rows = None if decided is None else decided.rows
        if rows is None or not (rows.alike is family.alike or rows.alike == family.alike):
            return None
        return self._lead(family, x, call, rows) if rows.fit(x, call.base) else None

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
        return self._lead(family, x, call, rows)

    def _lead(self, family: Family, x: torch.Tensor, call: Any, rows: Rows | None) -> torch.Tensor | None:
        if not _plain(x, call) or (family.sites is not None and x.dtype is not torch.float32):
            return None  # gates are computed in float32
        if len(family.targets) == 1:
            mixed = family.alone(x, call, rows)
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
        here = self._here
        here.pending, here.quick, here.unversioned = None, False, False

    def clear(self) -> None:
        """Forget the families too."""
        self.forget()
        self._of.clear()

    def _watch(self, x: torch.Tensor, target: str) -> None:
        here = self._here
        same = x is here.last and _is_as_before(x, here.state)
        if same and here.run[-1] == target:
            return
        if not same or target in here.run:
            self._close()
            here.last, here.state = x, x.clone() if x.is_inference() else x._version
        here.run = (*here.run, target)

    def _close(self) -> None:
        here = self._here
        run, here.run, here.last, here.state = here.run, (), None, None
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
        if self._reads_tokens and all(lane.alone and lane.decides and not lane.of_encoder for lane in lanes):
            sites = [self._gates[lane.site.name] for lane in lanes]
            rows, experts = alike[0].matrix_RE.shape
            fit = all(type(site.gate) is LinearScores and site.soft and site.soft.mixes_all(rows) for site in sites)
            return Family(targets, layers, alike, sites) if fit and sites[0].num_experts == experts else None
        if any(lane.site is not lanes[0].site for lane in lanes) or any(lane.decides for lane in lanes[1:]):
            return None
        return Family(targets, layers, alike, None, None if lanes[0].decides else lanes[0].site.name)


_UNSEEN: Any = object()


def _expand(call: Any, z_NR: torch.Tensor, alpha: float) -> torch.Tensor:
    """Add ``alpha z B`` to the base output."""
    base, b_RO = call.base, call.stack.b_RO
    base.view(-1, b_RO.shape[1]).addmm_(z_NR, b_RO, alpha=alpha)
    return base


def _plain(x: torch.Tensor, call: Any) -> bool:
    """Whether a base output can be added to in place, without autograd."""
    base = call.base
    if torch.is_grad_enabled() or not call.owns_base or x.ndim != 3 or base.dtype is not x.dtype:
        return False
    return base.is_contiguous() and x.is_contiguous()


def _version(x: torch.Tensor) -> int:
    """How often it was written to; an inference tensor does not know that."""
    return 0 if x.is_inference() else x._version


def _is_as_before(x: torch.Tensor, state: Any) -> bool:
    return torch.equal(x, state) if isinstance(state, torch.Tensor) else _version(x) == state
