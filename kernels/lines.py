"""Products on sorted lines where nothing is differentiated: memory is written twice, and little is left per call.

Shape letters: ``T`` tokens, ``K`` adapters per token, ``U`` distinct adapters among them, ``Q`` lines, ``L`` lines of
one tile, ``D`` in, ``O`` out, ``r`` largest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import embedding_bag, grouped_mm

if TYPE_CHECKING:
    from compose.kernels.routed import Layout

TILE_BYTES = 2 << 20
"""Lines of one tile: about a level-2 cache."""
WHOLE_BYTES = 16 << 20
"""Lines up to this size are one tile; the system zeroes the pages of larger copies anew in every call."""

Spans = tuple[tuple[int, int], ...]


class Tile(NamedTuple):
    """Neighbouring lines, taken, multiplied and put in their places before the next ones are.

    Attributes:
        source_L: ``(L,)`` the token of each line.
        c_L1: ``(L, 1)`` coefficients.
        sizes: How many lines each adapter has in this tile.
        a: Per adapter a view ``(D, rank)``.
        b: Per adapter a view ``(rank, O)``.
    """

    source_L: torch.Tensor
    c_L1: torch.Tensor
    sizes: list[int]
    a: list[torch.Tensor]
    b: list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class SortedForward:
    """``Σ_k c_tk B A x_t`` of one layout with given factors and coefficients; call it with ``x (T, D)``.

    Attributes:
        layout: Where the pairs of token and adapter lie.
        c_Q1: Coefficients of the lines.
        factors: ``(U, D, r)`` (a view) and ``(U, r, O)``: multiplied by ``bmm`` where the layout is padded, else by
            ``grouped_mm``. None where there are tiles.
        tiles: Segments, multiplied adapter by adapter; several only where every token has one adapter.
        idle_T: Tokens that no tile writes; None where there is one tile.
        out: ``O``.
    """

    layout: Layout
    c_Q1: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None
    tiles: tuple[Tile, ...]
    idle_T: torch.Tensor | None
    out: int

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return ``(T, O)``, fresh memory."""
        if self.idle_T is not None:
            return self._by_tiles(x_TD, self.idle_T)
        layout, factors = self.layout, self.factors
        if factors is not None and not layout.length:
            y = self._grouped(x_TD, *factors)
        else:
            y = self._in_place(x_TD if layout.in_order else x_TD.index_select(0, layout.source_Q))
        if layout.bounds[-1] < y.shape[0]:
            y[layout.bounds[-1] :] = 0.0
        return y if layout.in_order else add_pairs(y, layout.place_TK)

    def _in_place(self, lines_QD: torch.Tensor) -> torch.Tensor:
        """Lines are not read after the first product: where they are copies and fit, the result takes their place."""
        reuse = not self.layout.in_order and lines_QD.shape[1] == self.out
        y_QO = lines_QD if reuse else lines_QD.new_empty(lines_QD.shape[0], self.out)
        live, layout = self.layout.bounds[-1], self.layout
        used, result = (lines_QD, y_QO) if live == lines_QD.shape[0] else (lines_QD[:live], y_QO[:live])
        if self.factors is None:
            _segments(used, self.tiles[0], result)
        else:
            cells = (len(layout.adapters), layout.length, -1)
            h = torch.bmm(used.view(cells), self.factors[0]).mul_(self.c_Q1[:live].view(cells))
            torch.bmm(h, self.factors[1], out=result.view(cells))
        return y_QO

    def _grouped(self, x_TD: torch.Tensor, a_UDr: torch.Tensor, b_UrO: torch.Tensor) -> torch.Tensor:
        """No copy of ``x`` is held while the result is made, so that may get its memory."""
        layout, ends = self.layout, self.layout.ends_U
        if layout.in_order and x_TD.is_contiguous() and x_TD.data_ptr() % 16 == 0:
            h = grouped_mm(x_TD, a_UDr, offs=ends)
        else:
            h = grouped_mm(x_TD.index_select(0, layout.source_Q), a_UDr, offs=ends)
        if layout.bounds[-1] < h.shape[0]:
            h[layout.bounds[-1] :] = 0.0  # grouped_mm leaves lines behind the last group unwritten
        return grouped_mm(h.mul_(self.c_Q1), b_UrO, offs=ends)

    def _by_tiles(self, x_TD: torch.Tensor, idle_T: torch.Tensor) -> torch.Tensor:
        y = x_TD.new_empty(len(x_TD), self.out)
        wide_y = _wide(y)
        for tile in self.tiles:
            lines = x_TD.index_select(0, tile.source_L)
            delta = lines if lines.shape[1] == self.out else lines.new_empty(len(lines), self.out)
            _segments(lines, tile, delta)
            wide_y.index_copy_(0, tile.source_L, _wide(delta))
        if len(idle_T):
            y.index_fill_(0, idle_T, 0.0)
        return y


def sorted_forward(
    layout: Layout,
    factors: tuple[torch.Tensor, torch.Tensor],
    c_Q1: torch.Tensor,
    spans: Spans = (),
) -> SortedForward:
    """Prepare the products of ``routed_lowrank``'s operands."""
    a, b = factors
    if a.dim() == 3:
        return SortedForward(layout, c_Q1, (a.transpose(1, 2), b), (), None, b.shape[2])
    width = max(a.shape[1], b.shape[1])
    lines, most = len(layout.source_Q), max(1, TILE_BYTES // (width * a.element_size()))
    tiled = layout.place_TK.shape[1] == 1 and not layout.in_order and lines * width * a.element_size() > WHOLE_BYTES
    tiles = tuple(_tiles(layout, factors, c_Q1, spans, most if tiled else lines))
    idle_T = (layout.place_TK.squeeze(1) == layout.bounds[-1]).nonzero().squeeze(1) if tiled else None
    return SortedForward(layout, c_Q1, None, tiles, idle_T, b.shape[1])


def _tiles(
    layout: Layout, factors: tuple[torch.Tensor, torch.Tensor], c_Q1: torch.Tensor, spans: Spans, most: int
) -> list[Tile]:
    """Cut the lines into tiles of at most ``most``; an adapter with many lines has several."""
    pieces: list[list[tuple[int, int, int, int]]] = [[]]
    room = most
    for (start, stop), first, end in zip(spans, layout.bounds[:-1], layout.bounds[1:], strict=True):
        while first < end:
            if room == 0:
                pieces.append([])
                room = most
            taken = min(room, end - first)
            pieces[-1].append((first, first + taken, start, stop))
            first, room = first + taken, room - taken
    a, b = factors
    made = []
    for piece in pieces:
        lines = slice(piece[0][0], piece[-1][1])
        sizes = [end - first for first, end, _, _ in piece]
        mine = [a[start:stop].t() for *_, start, stop in piece]
        theirs = [b[start:stop] for *_, start, stop in piece]
        made.append(Tile(layout.source_Q[lines], c_Q1[lines], sizes, mine, theirs))
    return made


def _segments(lines_LD: torch.Tensor, tile: Tile, out_LO: torch.Tensor) -> None:
    """Two products per adapter; ``out`` may be ``lines``. Ranks may differ: places behind a rank are never read."""
    ranks = [a.shape[1] for a in tile.a]
    widest = max(ranks)
    h = lines_LD.new_empty(lines_LD.shape[0], widest)
    parts = list(h.split(tile.sizes))
    if min(ranks) < widest:
        parts = [part[:, :rank] for part, rank in zip(parts, ranks, strict=True)]
    for x, a, part in zip(lines_LD.split(tile.sizes), tile.a, parts, strict=True):
        torch.mm(x, a, out=part)
    h.mul_(tile.c_L1)
    for part, b, y in zip(parts, tile.b, out_LO.split(tile.sizes), strict=True):
        torch.mm(part, b, out=y)


def add_pairs(y_QO: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """The lines of each token, added up: ``(T, O)``."""
    if place_TK.shape[1] == 1:
        return y_QO.index_select(0, place_TK.view(-1))
    return embedding_bag(place_TK, y_QO, mode="sum")


def _wide(rows: torch.Tensor) -> torch.Tensor:
    """Fresh rows as numbers of 16 bytes where they divide: ``index_copy_`` moves one number at a time."""
    return rows.view(torch.complex128) if rows.shape[1] * rows.element_size() % 16 == 0 else rows
