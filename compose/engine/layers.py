"""The modules that stand in for a targeted layer while a bank is attached; each holds the original module object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compose.engine.coefficients import LayerCall, Selection
from compose.kernels.stack import LoraStack
from compose.kernels.watched import watched


class RuntimeState:
    """What one handle's layers read in every forward; owned by the handle, never global.

    Attributes:
        placed: ``active`` in the numbering of the layers' stacks: what layers apply. Another object where the stacks
            hold only part of the bank.
        backend: Kernel backend name.
    """

    def __init__(self, backend: str, place: Callable[[Selection | None], Selection | None] | None = None) -> None:
        self.backend = backend
        self.placed: Selection | None = None
        self._active: Selection | None = None
        self._place = place

    @property
    def active(self) -> Selection | None:
        """The coefficients in force, or ``None`` for the bare base model."""
        return self._active

    @active.setter
    def active(self, selection: Selection | None) -> None:
        self.placed = selection if self._place is None else self._place(selection)
        self._active = selection


class _ComposedLayer(nn.Module):
    """Base of the two composed layers: the wrapped module, its stack, and the state shared with the handle."""

    a_RD: torch.Tensor
    b_RO: torch.Tensor
    scaling_E: torch.Tensor

    def __init__(self, base_layer: nn.Module, stack: LoraStack, target: str, state: RuntimeState) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.target = target
        self._state = state
        self._ranks = stack.ranks
        self.register_buffer("scaling_E", stack.scaling_E, persistent=False)
        self.register_buffer("a_RD", stack.a_RD, persistent=False)
        self.register_buffer("b_RO", stack.b_RO, persistent=False)
        self._stack: LoraStack | None = stack

    def make_trainable_(self) -> None:
        """Turn both factors into parameters (copies, so the bank's own tensors never change)."""
        for name in ("a_RD", "b_RO"):
            factor = self._buffers.pop(name)
            assert factor is not None  # noqa: S101 - registered in __init__
            self.register_parameter(name, nn.Parameter(factor.detach().clone()))
        self._stack = None

    @property
    def stack(self) -> LoraStack:
        """The factors as the kernels take them; rebuilt after the module was moved or cast."""
        if self._stack is None:
            self._stack = LoraStack(self.a_RD, self.b_RO, self.scaling_E, self._ranks)
        return self._stack

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight: models read it for its dtype, its device, or to tie it."""
        return self.base_layer.weight  # type: ignore[return-value]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _ComposedLayer:
        scaling_E = self.scaling_E
        super()._apply(fn, recurse)
        self.scaling_E = scaling_E.to(self.scaling_E.device)  # moved, never rounded to another dtype
        self._stack = None
        return self


class ComposedLinear(_ComposedLayer):
    """A linear layer (nn.Linear, GPT-2's Conv1D, a quantised linear) plus the active adapters' contribution."""

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """Input width ``D``."""
        return self.a_RD.shape[1]

    @property
    def out_features(self) -> int:
        """Output width ``O``."""
        return self.b_RO.shape[1]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``(B, D)`` or ``(B, T, D)`` -> the same with ``O``; further arguments go to the base layer."""
        layer: Any = self._modules["base_layer"]  # by attribute it runs torch's Python look-up, as do parameters
        state, own = self._state, layer._parameters
        plain = type(layer) is nn.Linear and "bias" in own and own.get("weight") is not None
        if plain and not args and not kwargs and not watched(layer):
            base, owned = nn.functional.linear(x, own["weight"], own["bias"]), True
        else:
            base, owned = layer(x, *args, **kwargs), _owns_output(layer)
        if state.placed is None:
            return base
        return state.placed.apply(x, LayerCall(self.stack, base, self.target, state.backend, owned))


def _owns_output(layer: nn.Module) -> bool:
    """Whether nothing else can hold the base layer's output, so that the update may be added in place."""
    plain = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
    return plain and not layer._forward_hooks


class ComposedEmbedding(_ComposedLayer):
    """An embedding plus the active adapters' contribution: the input is one-hot, so ``A x`` is a look-up."""

    @property
    def num_embeddings(self) -> int:
        """Vocabulary size."""
        return self.a_RD.shape[1]

    @property
    def embedding_dim(self) -> int:
        """Output width ``O``."""
        return self.b_RO.shape[1]

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """``(B, T)`` token ids -> ``(B, T, O)``."""
        base = self.base_layer(ids_BT)
        active = self._state.placed
        if active is None:
            return base
        stack = self.stack
        h_BTR = nn.functional.embedding(ids_BT, stack.a_RD.T)
        call = LayerCall(_expand_only(stack), None, self.target, self._state.backend, owns_base=False)
        delta = active.apply(h_BTR, call)
        scale = getattr(self.base_layer, "embed_scale", None)  # Gemma multiplies its embeddings, adapters included
        return base + (delta if scale is None else delta * scale.to(delta.dtype)).to(base.dtype)


def _expand_only(stack: LoraStack) -> LoraStack:
    """The stack with the identity ``(R, R)`` as ``a``: an input that already holds ``A x`` passes through."""
    eye = torch.eye(stack.a_RD.shape[0], dtype=stack.a_RD.dtype, device=stack.a_RD.device)
    return LoraStack(eye, stack.b_RO, stack.scaling_E, stack.ranks, stack.index)
