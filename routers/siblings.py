"""Siblings: targets that read the same input (q, k and v; gate and up) are mixed together when the first is called.

With single tokens a layer takes as long as its operators and calls take, whatever they compute. Siblings share the
product with ``A``; and where each has a soft gate of its own (`compose.routers.soft`) one decision serves them all.
Which targets are siblings is seen in the first forward: they are called one after the other with the same tensor. An
only child with a gate is a family too.

To share a product, factors and gates are moved next to each other in memory, without copies that could grow old; where
they were moved or replaced since, siblings part and are looked for again. Only on a CPU, and without autograd.

Shape letters: ``B`` rows, ``T`` tokens, ``N`` all tokens, ``S`` siblings, ``D`` width of their input, ``E`` experts,
``R`` rank rows of one sibling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compose.kernels.stack import LoraStack, Spread
from compose.routers.gates.linear import LinearScores
from compose.routers.lanes import Lane
from compose.routers.mixing import Mixer, Rows
from compose.routers.router import SiteRouter


class Family:
    """Siblings, and what was computed for those that are still to be called."""

    def __init__(self, targets: Sequence[str], layers: Sequence[Any], gates: Sequence[SiteRouter] | None) -> None:
        self._places = {target: place for place, target in enumerate(targets)}
        self._gates = None if gates is None else _JoinedGates(gates)
        self._a = side_by_side([layer.a_RD for layer in layers])
        for layer, a_RD in zip(layers, self._a.tensor_split(len(layers)), strict=True):
            layer.move_a_(a_RD)
        self._layers = layers
        self._stacks: list[LoraStack] = [layer.stack for layer in layers]
        self._spreads = [stack.spread() for stack in self._stacks]
        self._rows = self._stacks[0].num_rows
        self._x: torch.Tensor | None = None
        self._version = 0
        self._z_NR: torch.Tensor | None = None
        self._waiting: set[str] = set()

    def holds(self) -> bool:
        """Whether factors and gates lie where they were put, and gates are spread as they were."""
        if self._gates is not None and not self._gates.hold():
            return False
        known = zip(self._layers, self._stacks, self._spreads, strict=True)
        return all(layer.stack is stack and stack.spread() is spread for layer, stack, spread in known)

    @property
    def decides(self) -> bool:
        """Whether every sibling has a gate of its own."""
        return self._gates is not None

    def leads(self, target: str) -> bool:
        """Whether it is called first."""
        return self._places[target] == 0

    def lead(self, x: torch.Tensor, call: Any, rows: Rows | None) -> torch.Tensor | None:
        """The leader's mixture; the others' is kept for them. None where this input or its base output is not for it.

        Args:
            x: ``(B, T, D)``.
            call: The leader's.
            rows: What was decided for all siblings; None where each has a gate.
        """
        if not (_plain(x, call) and x.dtype == self._a.dtype and self.holds()):
            return None
        if self._gates is None:
            assert rows is not None  # noqa: S101 - decided before
            h_NR = nn.functional.linear(x.view(-1, x.shape[-1]), self._a)
            h_NR.view(*x.shape[:-1], len(self._places), self._rows).mul_(rows.c.unsqueeze(-2))
        elif x.dtype == self._gates.dtype:
            c_NR = self._gates.rows(x, self._spreads[0])
            h_NR = nn.functional.linear(x.view(-1, x.shape[-1]), self._a).mul_(c_NR)
        else:
            return None
        self._x, self._version, self._z_NR = x, x._version, h_NR
        self._waiting = set(self._places)
        return self.take(x, call)

    def take(self, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        """What the leader's call computed for this target; None where it did not, or for another input."""
        if self._x is not x or call.target not in self._waiting or x._version != self._version:
            return None
        place = self._places[call.target]
        if call.stack is not self._stacks[place] or not _plain(x, call):
            return None
        assert self._z_NR is not None  # noqa: S101 - kept together with the input
        base, b_RO = call.base, call.stack.b_RO
        base.view(-1, b_RO.shape[1]).addmm_(self._z_NR.narrow(1, place * self._rows, self._rows), b_RO)
        self._waiting.remove(call.target)
        if not self._waiting:
            self.forget()
        return base

    def forget(self) -> None:
        """Let go of the input."""
        self._x, self._z_NR = None, None
        self._waiting.clear()


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
        self._last: torch.Tensor | None = None
        self._run: list[str] = []  # targets called with it, one after the other

    def take(self, x: torch.Tensor, call: Any) -> torch.Tensor | None:
        """The mixture of a target whose leader was called with this input; None where there is none."""
        family = self._of.get(call.target)
        return None if family is None else family.take(x, call)

    def lead(self, x: torch.Tensor, call: Any, rows: Rows | None = None) -> torch.Tensor | None:
        """The mixture of a leader: by the gates of its family, or by rows decided for all of it.

        Calls of targets that are not known yet are watched.
        """
        family = self._of.get(call.target, _UNSEEN)
        if family is _UNSEEN:
            self._watch(x, call.target)
            return None
        if family is None or not family.leads(call.target) or family.decides != (rows is None):
            return None
        mixed = family.lead(x, call, rows)
        if mixed is None and not family.holds():
            for target in [target for target, own in self._of.items() if own is family]:
                del self._of[target]
        return mixed

    def forget(self) -> None:
        """Let go of inputs: at the end of a forward."""
        self._close()
        for family in set(self._of.values()):
            if family is not None:
                family.forget()

    def _watch(self, x: torch.Tensor, target: str) -> None:
        if x is self._last and self._run[-1] == target:
            return
        if x is not self._last or target in self._run:
            self._close()
            self._last = x
        self._run.append(target)

    def _close(self) -> None:
        run, self._run, self._last = self._run, [], None
        if run:
            family = self._family(run)
            self._of.update(dict.fromkeys(run, family))

    def _family(self, targets: Sequence[str]) -> Family | None:
        """Siblings whose ranks, scalings and ways of deciding are alike; else None."""
        lanes, layers = [self._lanes[target] for target in targets], [self._layers[target] for target in targets]
        if not all(layer.can_move for layer in layers):
            return None
        spread, *others = (self._mixer.spread_of(layer.stack, self._backend) for layer in layers)
        if spread is None or any(other is None or other.alike != spread.alike for other in others):
            return None
        if all(lane.alone and lane.decides and not lane.of_encoder for lane in lanes):
            gates = [self._gates[lane.site.name] for lane in lanes]
            return Family(targets, layers, gates) if _JoinedGates.can_join(gates, spread) else None
        shared = all(lane.site is lanes[0].site for lane in lanes) and not any(lane.decides for lane in lanes[1:])
        return Family(targets, layers, None) if shared and len(targets) > 1 else None


class _JoinedGates:
    """The gates of siblings: their scores are one product."""

    def __init__(self, gates: Sequence[SiteRouter]) -> None:
        linear: list[Any] = [gate.gate for gate in gates]
        self._weights: list[nn.Parameter] = [gate.weight_ED for gate in linear]
        self._weight = side_by_side([weight.data for weight in self._weights])
        for weight, place in zip(self._weights, self._weight.tensor_split(len(gates)), strict=True):
            weight.data = place
        self._biases: list[nn.Parameter] = [gate.bias_E for gate in linear if gate.bias_E is not None]
        self._places = [weight.data_ptr() for weight in self._weights]
        self._soft, *self._others = [gate.soft for gate in gates if gate.soft is not None]

    @staticmethod
    def can_join(gates: Sequence[SiteRouter], spread: Spread) -> bool:
        """Whether they decide alike, over these rank rows, and their parameters can be moved."""
        soft, linear = gates[0].soft, [gate.gate for gate in gates]
        if soft is None or not soft.mixes_all(spread.matrix_RE.shape[0]):
            return False
        if any(gate.soft is None or not gate.soft.like(soft) for gate in gates):
            return False
        if not all(isinstance(one, LinearScores) and type(one.weight_ED) is nn.Parameter for one in linear):
            return False
        kinds = {(one.weight_ED.shape, one.weight_ED.dtype, one.bias_E is None) for one in linear}  # type: ignore
        return len(kinds) == 1 and gates[0].num_experts == spread.matrix_RE.shape[1]

    def hold(self) -> bool:
        """Whether all weights lie where they were put, and all decide alike still."""
        if any(not soft.like(self._soft) for soft in self._others):
            return False
        return all(w.data_ptr() == place for w, place in zip(self._weights, self._places, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """What they compute in."""
        return self._weight.dtype

    def rows(self, x: torch.Tensor, spread: Spread | None) -> torch.Tensor:
        """``(N, S R)``: gates of ``x (B, T, D)`` spread over the siblings' rank rows."""
        assert spread is not None  # noqa: S101 - families have spreads
        bias = torch.cat(list(self._biases)) if self._biases else None
        scores = nn.functional.linear(x.view(-1, x.shape[-1]), self._weight, bias)
        gates = self._soft.dense(scores.view(-1, spread.matrix_RE.shape[1]))
        return nn.functional.linear(gates, spread.matrix_RE).view(scores.shape[0], -1)


_UNSEEN: Any = object()


def _plain(x: torch.Tensor, call: Any) -> bool:
    """Whether the base output can be added to in place."""
    base = call.base
    if torch.is_grad_enabled() or not call.owns_base or x.ndim != 3 or x.is_inference():
        return False
    return base.dtype == x.dtype and base.is_contiguous() and x.is_contiguous() and not base.is_inference()


def side_by_side(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices of one width, one below the other: a view where they lie so in memory, else in new memory."""
    first, rows = tensors[0], sum(len(tensor) for tensor in tensors)
    place, adjoin = first.storage_offset(), True
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjoin = adjoin and same and tensor.is_contiguous() and tensor.storage_offset() == place
        place += tensor.numel()
    with torch.inference_mode(False), torch.no_grad():
        if adjoin:
            return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
        return torch.cat([tensor.detach() for tensor in tensors])
