"""A layer of a key-value cache with room for tokens to come: a new one is written, the others are not copied for it.

Shape letters: ``B`` rows, ``H`` heads, ``S`` tokens in the cache, ``T`` new tokens, ``D`` width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Transformers' `DynamicLayer` for states without gradients; the same in all that is done to a cache.

    ``keys`` and ``values`` are the used part of longer tensors. Whoever replaces them (beams, rows that are repeated)
    gives up the room behind them, and the next token makes new room.
    """

    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states ``(B, H, T, D)``; return all ``(B, H, S + T, D)``."""
        if torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rooms = self._rooms or (None, None)
        first, self.keys = _appended(self.keys, rooms[0], key_states)
        second, self.values = _appended(self.values, rooms[1], value_states)
        self._rooms = first, second
        return self.keys, self.values

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._rooms = None


def _appended(
    kept: torch.Tensor | None, room: torch.Tensor | None, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The room, which may be another one now, and its used part."""
    length = kept.shape[-2] if kept is not None and kept.numel() else 0
    total = length + new.shape[-2]
    if room is None or kept is None or not _follows(kept, room, new, total):
        room = new.new_empty(*new.shape[:-2], total + total // 2 + 64, new.shape[-1])
        if kept is not None and length:
            room.narrow(-2, 0, length).copy_(kept)
    room.narrow(-2, length, new.shape[-2]).copy_(new)
    return room, room.narrow(-2, 0, total)


def _follows(kept: torch.Tensor, room: torch.Tensor, new: torch.Tensor, total: int) -> bool:
    """Whether new states can be written behind those kept."""
    same = kept.data_ptr() == room.data_ptr() and kept.stride() == room.stride()
    fits = total <= room.shape[-2] and room.shape[:-2] == new.shape[:-2] == kept.shape[:-2]
    return same and fits and room.dtype == new.dtype and room.is_inference() == torch.is_inference_mode_enabled()
