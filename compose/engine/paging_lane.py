"""The device's side of paging: slots of one dtype on one device, written on a stream of their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from compose.engine.paging_host import PageLayout
from compose.kernels.slots import Rows, SlotGroup
from compose.kernels.stack import LoraStack


class Lane:
    """Slots of all targets that share a dtype and a device.

    On a CUDA device a page travels in one copy from pinned memory to a staging buffer and is spread over the targets
    from there, all on a side stream. Three orders hold: a slot is written after the work that last used it (`release`
    records it), a batch runs after the writes of its slots (`wait`), and the staging buffer is reused in stream order.
    Elsewhere everything is synchronous. Not synchronised between threads: its owner holds a lock.

    Attributes:
        targets: Target -> ``(D, O)``.
        stacks: Target -> what its layer reads.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[int, int]],
        capacities: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.targets = dict(targets)
        self.dtype = dtype
        self.device = device
        self._group = SlotGroup.empty(capacities, self.targets, dtype=dtype, device=device)
        self.stacks: dict[str, LoraStack] = {target: one.stack for target, one in self._group.slots.items()}
        self._layouts: dict[tuple[int, ...], PageLayout] = {}
        self._unseen = False
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._start(max(capacities))

    def layout(self, ranks: Sequence[int]) -> PageLayout:
        """The layout of a page with these ranks, one per target."""
        key = tuple(ranks)
        if key not in self._layouts:
            self._layouts[key] = PageLayout(self.targets, key, self.dtype)
        return self._layouts[key]

    def write(self, slot: int, layout: PageLayout, buffer: torch.Tensor) -> None:
        """Put a page into a slot, over whatever is there."""
        self._unseen = True
        if self._stream is None:
            self._group.write(slot, *layout.views(buffer))
            return
        with torch.inference_mode(False), torch.cuda.stream(self._stream):
            released = self._released[slot]
            if released is not None:
                self._stream.wait_event(released)
            self._staging[: layout.nbytes].copy_(buffer, non_blocking=True)
            self._group.write(slot, *self._staged(layout))
            self._written[slot] = self._stream.record_event()

    def wait(self, slots: Collection[int]) -> None:
        """Let the current stream wait until ``slots`` are written, and drop casts made while any slot was."""
        if self._unseen:
            for stack in self.stacks.values():
                torch.autograd.graph.increment_version((stack.a_RD, stack.b_RO, stack.scaling_E))
            self._unseen = self._stream is not None and not self._stream.query()
        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            for slot in slots:
                written = self._written[slot]
                if written is not None:
                    current.wait_event(written)

    def release(self, slots: Collection[int]) -> None:
        """Note that nothing after the work now on the current stream uses ``slots``."""
        if self._stream is None or not slots:
            return
        event = torch.cuda.current_stream(self.device).record_event()
        for slot in slots:
            self._released[slot] = event

    def close(self) -> None:
        """Let the current stream wait for every write, so that the memory may be freed or changed from there."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _start(self, most: int) -> None:
        """Make the side stream, its events and its staging buffer."""
        stream = self._stream = torch.cuda.Stream(self.device)
        slots = len(self._group.capacities)
        self._written: list[torch.cuda.Event | None] = [None] * slots
        self._released: list[torch.cuda.Event | None] = [None] * slots
        self._views: dict[PageLayout, tuple[list[Rows | None], torch.Tensor, torch.Tensor]] = {}
        stream.wait_stream(torch.cuda.current_stream(self.device))  # the slots' zeros
        tables = [self._group.scaling_GE, self._group.ranks_GE]
        for tensor in [*tables, *(factor for one in self.stacks.values() for factor in (one.a_RD, one.b_RO))]:
            tensor.record_stream(stream)
        with torch.inference_mode(False), torch.cuda.stream(stream):
            nbytes = self.layout([most] * len(self.targets)).nbytes
            self._staging = torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _staged(self, layout: PageLayout) -> tuple[list[Rows | None], torch.Tensor, torch.Tensor]:
        if layout not in self._views:
            self._views[layout] = layout.views(self._staging[: layout.nbytes])
        return self._views[layout]
