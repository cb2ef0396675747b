"""Backward of `packed_lora`: the forward's kernels with the factors swapped, and one more for the factors themselves.

With ``h = x firstᵀ``, ``z = c h`` and ``dz = dy secondᵀ`` per rank row: ``dx = (c dz) first``, ``dfirst = (c dz)ᵀ x``,
``dsecond = zᵀ dy``, and the gradient of a coefficient is the sum of ``h dz`` over the rows it rules.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import NamedTuple

import torch

from compose.kernels.packed.launch import Packed, Route, Saved, low_rank, weight_gradient
from compose.kernels.packed.products import row_sums
from compose.kernels.packed.table import TileTable, tile_table

_BLOCK = 64


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    first: bool
    second: bool
    scaling: bool
    gates: bool


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    saved: Saved,
    first: torch.Tensor,
    second: torch.Tensor,
    packed: Packed,
    route: Route,
    wanted: Wanted,
    *,
    onto: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return the five gradients of `Wanted`, empty ones where none is wanted.

    Args:
        dy: ``(M, O)`` contiguous.
        x: ``(M, D)``, needed for ``first``.
        saved: By `low_rank`: ``z`` for ``second``, ``h`` for ``scaling`` and ``gates``.
        first: ``(R, D)``.
        second: ``(R, O)``.
        packed: Of the stack.
        route: Coefficients.
        wanted: What to compute.
        onto: ``(M, D)``: the gradient of ``x`` is added to it, in place.
    """
    _make_context_current(dy)
    grads = [dy.new_empty(0) for _ in wanted]
    gating = wanted.scaling or wanted.gates
    side = _Dense(packed, route) if route.shape == "dense" else _Pairs(packed, route)
    if wanted.x or wanted.first or gating:
        grads[0], back = low_rank(dy, second, first, packed, route, onto, want_h=gating, want_z=wanted.first, out=onto)
    if wanted.first and x is not None:
        grads[1] = side.factor(back, x, first)
    if wanted.second:
        grads[2] = side.factor(saved, dy, second)
    if gating and saved.h is not None and back.h is not None:
        dscaling, dgates = side.coefficients(saved.h, back.h, scaling=wanted.scaling)
        grads[3] = grads[3] if dscaling is None else dscaling
        if route.gates is not None:
            grads[4] = dgates.to(route.gates.dtype)
    return [grad if need else dy.new_empty(0) for grad, need in zip(grads, wanted, strict=True)]


_threads = threading.local()


def _make_context_current(dy: torch.Tensor) -> None:
    """Run a kernel of torch once per thread: a new thread of autograd has no current context before.

    A compiled kernel of Triton does not make one, and cuBLAS does so with a warning.
    """
    known = _threads.__dict__.setdefault("devices", set())
    if dy.is_cuda and dy.device not in known:
        dy.new_zeros(1)
        known.add(dy.device)


class _Dense:
    """Gradients where ``h`` is ``(M, R)``."""

    def __init__(self, packed: Packed, route: Route) -> None:
        self.packed, self.route = packed, route
        self.tokens = route.tokens_per_entry

    @cached_property
    def gates(self) -> torch.Tensor:
        """``(N, E)`` float32."""
        return _dense_gates(self.packed, self.route)

    def factor(self, saved: Saved, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``zᵀ x``."""
        if saved.z is not None:
            z = saved.z
        else:
            h = _there(saved.h)
            c_NR = (self.gates * self.packed.scaling_E).index_select(1, self.packed.adapter_R)
            z = (h.view(-1, self.tokens, h.shape[1]) * c_NR[:, None]).to(x.dtype).view_as(h)
        return torch.mm(z.t(), x).to(weight.dtype)

    def coefficients(
        self, h: torch.Tensor, dz: torch.Tensor, *, scaling: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gradients of scaling and gates."""
        num_adapters = self.packed.scaling_E.shape[0]
        gates = self.route.gates
        if self.route.ids is None and gates is not None and self.tokens == 1 and not scaling:
            scaling_E, owner_R = self.packed.scaling_E, self.packed.adapter_R
            return None, row_sums(h, dz, owner_R, num_adapters, scaling_E=scaling_E, dtype=gates.dtype)
        sums_ME = row_sums(h, dz, self.packed.adapter_R, num_adapters)
        sums_NE = sums_ME if self.tokens == 1 else sums_ME.view(-1, self.tokens, num_adapters).sum(1)
        dscaling = (self.gates * sums_NE).sum(0) if scaling else None
        dgates = sums_NE * self.packed.scaling_E
        if self.route.ids is not None:
            known = (self.route.ids >= 0) & (self.route.ids < num_adapters)
            dgates = torch.where(known, dgates.gather(1, torch.where(known, self.route.ids, 0)), 0.0)
        return dscaling, dgates


class _Pairs:
    """Gradients where ``h`` is ``(M K, Rmax)``: a line per token and slot."""

    def __init__(self, packed: Packed, route: Route) -> None:
        self.packed, self.route, self.slots = packed, route, route.slots
        assert route.ids is not None  # noqa: S101 - rows and tiles have ids
        self.known_NK = (route.ids >= 0) & (route.ids < packed.scaling_E.shape[0])
        self.ids_NK = torch.where(self.known_NK, route.ids, 0)
        gates = 1.0 if route.gates is None else route.gates.float()
        self.gates_NK = torch.where(self.known_NK, gates, 0.0)
        self._table: TileTable | None = route.table

    @property
    def table(self) -> TileTable:
        """Tokens sorted by adapter."""
        if self._table is None:
            ids_NK = torch.where(self.known_NK, self.ids_NK, -1)
            ids_MK = ids_NK.repeat_interleave(self.route.tokens_per_entry, dim=0)
            self._table = tile_table(ids_MK, self.packed.scaling_E.shape[0], _BLOCK)
        return self._table

    def factor(self, saved: Saved, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``zᵀ x`` per adapter."""
        if saved.z is not None:
            z = saved.z
        else:
            h = _there(saved.h)
            c_NK = self.gates_NK * self.packed.scaling_E[self.ids_NK]
            per_token = h.view(-1, self.route.tokens_per_entry, self.slots, h.shape[1])
            z = (per_token * c_NK[:, None, :, None]).to(x.dtype).view_as(h)
        return weight_gradient(z, x, weight, self.packed, self.slots, self.table, self.route.precision)

    def coefficients(
        self, h: torch.Tensor, dz: torch.Tensor, *, scaling: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Gradients of scaling and gates; sums per adapter run over sorted tokens, so their order is fixed."""
        sums_MK = (h * dz).sum(1).view(-1, self.slots)
        sums_NK = sums_MK.view(-1, self.route.tokens_per_entry, self.slots).sum(1)
        dgates = torch.where(self.known_NK, sums_NK * self.packed.scaling_E[self.ids_NK], 0.0)
        if not scaling:
            return None, dgates
        weighted = (self.gates_NK * sums_NK).repeat_interleave(self.route.tokens_per_entry, dim=0)
        weighted = weighted / self.route.tokens_per_entry
        dscaling = torch.zeros_like(self.packed.scaling_E)
        for slot in range(self.slots):
            ordered = weighted[:, slot][self.table.order[slot].long()]
            dscaling += torch.segment_reduce(ordered, "sum", offsets=self.table.bounds[slot].long())[1:]
        return dscaling, dgates


def _there(tensor: torch.Tensor | None) -> torch.Tensor:
    """A tensor that the forward pass was told to save."""
    assert tensor is not None  # noqa: S101 - `low_rank` saves h where it saves no z
    return tensor


def _dense_gates(packed: Packed, route: Route) -> torch.Tensor:
    """``(N, E)`` float32."""
    if route.ids is None:
        assert route.gates is not None  # noqa: S101 - one of the two is given
        return route.gates.float()
    num_adapters = packed.scaling_E.shape[0]
    places = torch.where((route.ids < 0) | (route.ids >= num_adapters), num_adapters, route.ids)
    gates = torch.ones_like(places, dtype=torch.float32) if route.gates is None else route.gates.float()
    dense = gates.new_zeros(len(places), num_adapters + 1)
    for slot in range(places.shape[1]):  # one index per line and turn, so no two writes meet
        dense.scatter_add_(1, places[:, slot : slot + 1], gates[:, slot : slot + 1])
    return dense[:, :num_adapters]
