"""Thousands of random adapters in host memory, packed into a few large buffers, and the bank that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.paging import PagedModel
from compose.engine.paging_host import Page, PageLayout
from compose.formats.header import TargetHeader

_CHUNK = 1 << 31  # pinned allocations are rounded up to powers of two
_ALIGN = 16
_SCALING = 2.0
_SPREAD = 0.02


class PackedEntry:
    """One adapter of a bank whose factors lie in a packed buffer: an entry as the bank's own for files and memory."""

    def __init__(
        self, name: str, shapes: Mapping[str, TargetHeader], layout: PageLayout, buffer: torch.Tensor
    ) -> None:
        self.name = name
        self.base = "random"
        self.shapes = shapes
        self.layout = layout
        self.buffer = buffer

    def resident(self) -> Adapter | None:
        """Return None: the adapter is made of views when it is asked for."""
        return None

    def read(self) -> Adapter:
        """Return views of the buffer."""
        rows, _, _ = self.layout.views(self.buffer)
        updates = {
            target: LowRank(one.a_rD, one.b_rO.T, _SCALING)
            for target, one in zip(self.layout.targets, rows, strict=True)
            if one is not None
        }
        return self.rebuild(updates)

    def rebuild(self, targets: Mapping[str, LowRank]) -> Adapter:
        """Return the adapter around other factors."""
        return Adapter(self.name, self.base, targets)

    def sha256(self) -> str:
        """There is no file."""
        return ""


def random_bank(model: Any, targets: Sequence[str], count: int, rank: int, device: str) -> Bank:
    """Return ``count`` adapters of one rank on all layers of the names ``targets``, in pinned memory beside a GPU.

    Values are drawn on the device, a chunk of adapters at a time.
    """
    layers = {path: one for path, one in model.named_modules() if path.split(".")[-1] in targets}
    dtype = next(iter(layers.values())).weight.dtype
    widths = {path: (one.in_features, one.out_features) for path, one in layers.items()}
    shapes = {
        path: TargetHeader("linear", rank, width, out, _SCALING, dtype, "", "")
        for path, (width, out) in widths.items()
    }
    layout = PageLayout(widths, [rank] * len(widths), dtype)
    stride = -(-layout.nbytes // _ALIGN) * _ALIGN
    per_chunk = max(1, min(count, _CHUNK // stride))
    names = [f"adapter-{number}" for number in range(count)]
    entries: list[PackedEntry] = []
    torch.manual_seed(4)
    drawn = torch.zeros(per_chunk, stride, dtype=torch.uint8, device=device)
    for page in drawn:
        _, scaling_G, ranks_G = layout.views(page[: layout.nbytes])
        scaling_G.fill_(_SCALING)
        ranks_G.fill_(rank)
    entries_each = sum(rank * (width + out) for width, out in widths.values())
    factors = drawn[:, : entries_each * dtype.itemsize].view(dtype)
    for start in range(0, count, per_chunk):
        chosen = names[start : start + per_chunk]
        factors.normal_(std=_SPREAD)
        kept = torch.empty(per_chunk, stride, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
        kept.copy_(drawn)
        entries += [PackedEntry(name, shapes, layout, kept[row, : layout.nbytes]) for row, name in enumerate(chosen)]
    return Bank(entries)


def page_bytes(bank: Bank) -> int:
    """Bytes of one adapter of ``random_bank``."""
    return next(entry.layout.nbytes for entry in bank._entries.values() if isinstance(entry, PackedEntry))


def fill_host(handle: PagedModel, bank: Bank) -> None:
    """Put every adapter into the handle's host memory as it is, without a copy."""
    host = handle._pager.host
    for entry in bank._entries.values():
        assert isinstance(entry, PackedEntry)  # noqa: S101 - from random_bank
        host.put(entry.name, Page([entry.layout], [entry.buffer]))
