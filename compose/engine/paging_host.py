"""Adapters in host memory, ready to be copied into slots: packed pages, the least recently used dropped first.

Shape letters: ``G`` targets of a lane, ``r`` rank of one adapter, ``D`` input width, ``O`` output width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch

from compose.adapter import LowRank
from compose.kernels.slots import Rows

_ALIGN = 16


class PageLayout:
    """Where the factors of one adapter lie in one packed buffer, for the targets of one dtype and device.

    ``a (r, D)`` and ``b (r, O)`` of every target in order, each as dense rows, then scalings, then ranks.

    Attributes:
        targets: Target -> ``(D, O)``.
        ranks: One per target, 0 where the adapter misses it.
        dtype: Of the factors.
        nbytes: Length of the buffer.
    """

    def __init__(self, targets: Mapping[str, tuple[int, int]], ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.targets = targets
        self.ranks = tuple(ranks)
        self.dtype = dtype
        widths = targets.values()
        entries = sum(rank * (width + out) for rank, (width, out) in zip(self.ranks, widths, strict=True))
        self._tail = -(-entries * dtype.itemsize // _ALIGN) * _ALIGN
        self._entries = entries
        self.nbytes = self._tail + 8 * len(self.ranks)

    def views(self, buffer: torch.Tensor) -> tuple[list[Rows | None], torch.Tensor, torch.Tensor]:
        """Return rows per target (``None`` at rank 0), scalings ``(G,)`` float32 and ranks ``(G,)`` int32.

        Args:
            buffer: ``(nbytes,)`` uint8; the results are views of it.
        """
        count = len(self.ranks)
        factors = buffer[: self._entries * self.dtype.itemsize].view(self.dtype)
        rows: list[Rows | None] = []
        start = 0
        for rank, (width, out) in zip(self.ranks, self.targets.values(), strict=True):
            if rank == 0:
                rows.append(None)
                continue
            middle, end = start + rank * width, start + rank * (width + out)
            rows.append(Rows(factors[start:middle].view(rank, width), factors[middle:end].view(rank, out)))
            start = end
        numbers = buffer[self._tail :]
        return rows, numbers[: 4 * count].view(torch.float32), numbers[4 * count :].view(torch.int32)

    def fill(self, buffer: torch.Tensor, updates: Mapping[str, LowRank]) -> None:
        """Write one adapter into ``buffer``, cast to the page's dtype."""
        rows, scaling_G, ranks_G = self.views(buffer)
        present = [updates.get(target) for target in self.targets]
        for one, update in zip(rows, present, strict=True):
            if one is not None and update is not None:
                one.a_rD.copy_(update.a.detach())
                one.b_rO.copy_(update.b.detach().T)
        scaling_G.copy_(torch.tensor([0.0 if update is None else update.scaling for update in present]))
        ranks_G.copy_(torch.tensor(self.ranks, dtype=torch.int32))


class Page:
    """One adapter in host memory.

    Attributes:
        layouts: One per lane.
        buffers: One per lane, ``(layout.nbytes,)`` uint8; never written to again once they are in use.
    """

    def __init__(self, layouts: Sequence[PageLayout], buffers: Sequence[torch.Tensor]) -> None:
        self.layouts = tuple(layouts)
        self.buffers = tuple(buffers)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(layout.nbytes for layout in self.layouts)


class HostTier:
    """Pages by name, bounded by bytes. Not synchronised: its owner holds a lock.

    Attributes:
        limit: Most bytes kept.
        held: Bytes kept now.
        hits: How often a page was here.
        reads: How often one was read through the bank.
        bytes_read: Bytes of the pages read.
    """

    def __init__(self, limit: int, read: Callable[[str], Page]) -> None:
        self.limit = limit
        self.held = 0
        self.hits = self.reads = self.bytes_read = 0
        self._read = read
        self._pages: OrderedDict[str, Page] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self._pages

    def get(self, name: str) -> Page:
        """Return the page of ``name``, read if it is not here; whatever the reader raises is passed on."""
        if name in self._pages:
            self.hits += 1
            self._pages.move_to_end(name)
            return self._pages[name]
        page = self._read(name)
        self.reads += 1
        self.bytes_read += page.nbytes
        self.put(name, page)
        return page

    def put(self, name: str, page: Page) -> None:
        """Keep a page, in place of an older one of this name, and drop the least recently used beyond the limit."""
        before = self._pages.pop(name, None)
        self.held += page.nbytes - (0 if before is None else before.nbytes)
        self._pages[name] = page
        while self.held > self.limit:
            _, dropped = self._pages.popitem(last=False)
            self.held -= dropped.nbytes

    def clear(self) -> None:
        """Drop everything."""
        self._pages.clear()
        self.held = 0
