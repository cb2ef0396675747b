"""A layer of a key-value cache with room for tokens to come: a new one is written, the others are not copied for it.

Shape letters: ``B`` rows, ``H`` heads, ``S`` tokens in the cache, ``T`` new tokens, ``D`` width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Transformers' `DynamicLayer` for states without gradients; the same in all that is done to a cache.

    ``keys`` and ``values`` are the used part of longer tensors: not contiguous, and saved one by one with all of their
    memory. Where they were replaced since (beams, rows that are repeated), cropped, or continued by a copy of the
    layer, the next token makes new room.
    """

    _rooms: tuple[_Room, _Room] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states ``(B, H, T, D)``; return all ``(B, H, S + T, D)``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None  # noqa: S101 - initialised
        assert self.values is not None  # noqa: S101 - initialised
        traced = torch.compiler.is_compiling()  # for the compiler memory is no place, and it joins states by itself
        if traced or torch.is_grad_enabled() or _unlike(self.keys, key_states) or _unlike(self.values, value_states):
            self._rooms = None
            return super().update(key_states, value_states, *args, **kwargs)
        rooms = self._rooms or (None, None)
        self._rooms = (
            _room_behind(self.keys, rooms[0], key_states),
            _room_behind(self.values, rooms[1], value_states),
        )
        self.keys, self.values = self._rooms[0].append(key_states), self._rooms[1].append(value_states)
        return self.keys, self.values

    def give_up_room(self) -> None:
        """Let go of room that `keys` and `values` are no longer part of: after they were replaced."""
        self._rooms = None

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.give_up_room()

    def offload(self) -> None:
        """Move what is kept to the CPU."""
        super().offload()
        self.give_up_room()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take other rows, one for each."""
        super().reorder_cache(beam_idx)
        self.give_up_room()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every row several times."""
        super().batch_repeat_interleave(repeats)
        self.give_up_room()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.give_up_room()


def make_room(cache: Any) -> None:
    """Have a cache keep new tokens in layers with room: those of a dynamic cache that hold nothing yet are replaced.

    Other layers, caches of other kinds, the encoder's states, and ``None`` stay as they are.
    """
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if not isinstance(own, DynamicCache) or own.offloading:
        return
    own.layers[:] = [
        GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer for layer in own.layers
    ]
    if own.layer_class_to_replicate is DynamicLayer:
        own.layer_class_to_replicate = GrowingLayer


class _Room:
    """Memory with states at its beginning; shared by copies of a layer, of which the first one to go on has it."""

    def __init__(self, whole: torch.Tensor, written: int) -> None:
        self.whole, self.written = whole, written
        self._lead, self._total = whole.shape[:-2], whole.shape[-2]
        self._used: torch.Tensor | None = None

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Write states behind those written; return all."""
        tokens = new.shape[-2]
        self.whole.narrow(-2, self.written, tokens).copy_(new)
        self.written += tokens
        self._used = self.whole.narrow(-2, 0, self.written)
        return self._used

    def continues(self, kept: torch.Tensor, new: torch.Tensor) -> bool:
        """Whether new states can be written behind those kept."""
        whole = self.whole
        if self.written + new.shape[-2] > self._total or whole.is_inference() != torch.is_inference_mode_enabled():
            return False
        if new.shape[:-2] != self._lead or new.dtype is not whole.dtype:
            return False
        if kept.data_ptr() != whole.data_ptr():
            return False
        if kept is self._used:
            return True
        return kept.stride() == whole.stride() and kept.shape[-2] == self.written and kept.shape[:-2] == self._lead


def _unlike(kept: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether states cannot be continued, or not in their type."""
    return kept.numel() > 0 and (kept.dtype is not new.dtype or kept.shape[:-2] != new.shape[:-2])


def _room_behind(kept: torch.Tensor, room: _Room | None, new: torch.Tensor) -> _Room:
    """The room that states are kept in, or new room with a copy of them."""
    if room is not None and room.continues(kept, new):
        return room
    length = kept.shape[-2] if kept.numel() else 0
    total = length + new.shape[-2]
    whole = new.new_empty(*new.shape[:-2], total + total // 2 + 64, new.shape[-1])
    if length:
        whole.narrow(-2, 0, length).copy_(kept)
    return _Room(whole, length)
