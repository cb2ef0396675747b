"""Backward of `packed_lora`: the forward's kernels with the factors swapped, and one more for the factors themselves.

With ``h = x firstᵀ`` and ``dz = dy secondᵀ`` per rank row: ``dx = (c dz) first``, ``dfirst = (c dz)ᵀ x``,
``dsecond = (c h)ᵀ dy``, and the gradient of a coefficient is the sum of ``h dz`` over the rows it rules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compose.kernels.packed.launch import Packed, Route, low_rank, slots_of, weight_gradient
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
    h: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    packed: Packed,
    route: Route,
    wanted: Wanted,
) -> list[torch.Tensor]:
    """Return the five gradients of `Wanted`, empty ones where none is wanted.

    Args:
        dy: ``(M, O)`` contiguous.
        x: ``(M, D)``, needed for ``first``.
        h: As saved by `low_rank`, needed for ``second``, ``scaling`` and ``gates``.
        first: ``(R, D)``.
        second: ``(R, O)``.
        packed: Of the stack.
        route: Coefficients.
        wanted: What to compute.
    """
    none = dy.new_empty(0)
    grads = [none] * 5
    dz = none
    if wanted.x or wanted.first or wanted.scaling or wanted.gates:
        save = wanted.first or wanted.scaling or wanted.gates
        grads[0], dz = low_rank(dy, second, first, packed, route, None, save=save)
    side = _Dense(packed, route, dy) if route.shape == "dense" else _Pairs(packed, route, dy)
    if wanted.first and x is not None:
        grads[1] = side.factor(dz, x, first)
    if wanted.second:
        grads[2] = side.factor(h, dy, second)
    if wanted.scaling or wanted.gates:
        grads[3], dgates = side.coefficients(h.float() * dz.float())
        if route.gates is not None:
            grads[4] = dgates.to(route.gates.dtype)
    return [grad if need else none for grad, need in zip(grads, wanted, strict=True)]


class _Dense:
    """Gradients where ``h`` is ``(M, R)``."""

    def __init__(self, packed: Packed, route: Route, dy: torch.Tensor) -> None:
        self.packed, self.route = packed, route
        self.gates_NE = _dense_gates(packed, route, dy)
        self.tokens = route.tokens_per_entry

    def factor(self, h: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``(c h)ᵀ x``."""
        c_NR = (self.gates_NE * self.packed.scaling_E).index_select(1, self.packed.adapter_R)
        z = (h.view(-1, self.tokens, h.shape[1]) * c_NR[:, None]).to(x.dtype).view_as(h)
        return torch.mm(z.t(), x).to(weight.dtype)

    def coefficients(self, product_MR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of scaling and gates."""
        adapters = torch.arange(self.packed.scaling_E.shape[0], device=product_MR.device)
        owner_RE = (self.packed.adapter_R[:, None] == adapters).to(product_MR.dtype)
        sums_NR = product_MR.view(-1, self.tokens, product_MR.shape[1]).sum(1)
        sums_NE = sums_NR @ owner_RE
        dscaling, dgates = (self.gates_NE * sums_NE).sum(0), sums_NE * self.packed.scaling_E
        if self.route.ids is not None:
            known = (self.route.ids >= 0) & (self.route.ids < len(adapters))
            dgates = torch.where(known, dgates.gather(1, torch.where(known, self.route.ids, 0)), 0.0)
        return dscaling, dgates


class _Pairs:
    """Gradients where ``h`` is ``(M K, Rmax)``: a line per token and slot."""

    def __init__(self, packed: Packed, route: Route, dy: torch.Tensor) -> None:
        self.packed, self.route, self.slots = packed, route, slots_of(route)
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

    def factor(self, h: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``(c h)ᵀ x`` per adapter."""
        c_NK = self.gates_NK * self.packed.scaling_E[self.ids_NK]
        per_token = h.view(-1, self.route.tokens_per_entry, self.slots, h.shape[1])
        z = (per_token * c_NK[:, None, :, None]).to(x.dtype).view_as(h)
        return weight_gradient(z, x, weight, self.packed, self.slots, self.table, self.route.precision)

    def coefficients(self, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of scaling and gates; sums per adapter run over sorted tokens, so their order is fixed."""
        sums_MK = product.sum(1).view(-1, self.slots)
        sums_NK = sums_MK.view(-1, self.route.tokens_per_entry, self.slots).sum(1)
        dgates = torch.where(self.known_NK, sums_NK * self.packed.scaling_E[self.ids_NK], 0.0)
        weighted = (self.gates_NK * sums_NK).repeat_interleave(self.route.tokens_per_entry, dim=0)
        weighted = weighted / self.route.tokens_per_entry
        dscaling = torch.zeros_like(self.packed.scaling_E)
        for slot in range(self.slots):
            ordered = weighted[:, slot][self.table.order[slot].long()]
            dscaling += torch.segment_reduce(ordered, "sum", offsets=self.table.bounds[slot].long())[1:]
        return dscaling, dgates


def _dense_gates(packed: Packed, route: Route, dy: torch.Tensor) -> torch.Tensor:
    """``(N, E)`` float32."""
    if route.ids is None:
        assert route.gates is not None  # noqa: S101 - one of the two is given
        return route.gates.float()
    num_adapters = packed.scaling_E.shape[0]
    places = torch.where((route.ids < 0) | (route.ids >= num_adapters), num_adapters, route.ids)
    gates = torch.ones_like(places, dtype=torch.float32) if route.gates is None else route.gates.float()
    dense = dy.new_zeros(len(places), num_adapters + 1, dtype=torch.float32)
    for slot in range(places.shape[1]):  # one index per line and turn, so no two writes meet
        dense.scatter_add_(1, places[:, slot : slot + 1], gates[:, slot : slot + 1])
    return dense[:, :num_adapters]
