"""BasePrompt: the prompt as the bare base model sees it, read once per batch; a decoder decides on its encoder's.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from compose.errors import IncompatibleError
from compose.routers.bodies import Body, pooled
from compose.routers.context import repeat_rows
from compose.routers.first_pass import base_pass
from compose.routers.taps import tapped


class BasePrompt:
    """Reads prompts, and knows from which of them encoder states were made, as long as somebody holds those."""

    def __init__(self, attached: Any, pooling: str, tap: str) -> None:
        self._attached, self._pooling, self._tap = attached, pooling, tap
        self._prompt_BD: torch.Tensor | None = None  # what the encoder reads now
        self._inside = False
        self._of_call: torch.Tensor | None = None  # read in the model's forward that runs now
        self._made_from = WeakTensorKeyDictionary()  # encoder states -> their prompt; None: the base model's own
        self._last: torch.Tensor | None = None  # generation repeats the rows of these and forgets them

    def begin(self) -> None:
        """A forward of the whole model begins."""
        self._inside, self._of_call = True, None

    def end(self) -> None:
        """It ended."""
        self._inside, self._of_call = False, None

    def of(self, body: Body, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """``(B, D)``: the prompt of the batch that ``body``, which is ``module``, is called with.

        Encoder states that the bare base model made are a prompt by themselves, but not a tapped one.

        Raises:
            IncompatibleError: A decoder got no encoder states, or some of which the prompt is not known.
        """
        if not body.decodes:
            self._prompt_BD = self._read(body, module, args, kwargs)
            self._of_call = self._prompt_BD if self._inside else None
            return self._prompt_BD
        if body.encoder is None:
            return pooled(self._pooling, None, body)
        if self._of_call is not None:
            return repeat_rows(self._of_call, len(body.encoder))
        return self._behind(body, body.encoder)

    def encoded(self, states_BTD: torch.Tensor, *, bare: bool) -> None:
        """Say what the encoder made of its input: with the router in force, or as the bare base model."""
        self._made_from[states_BTD] = None if bare else self._prompt_BD
        if not bare and not states_BTD.requires_grad:
            self._last = states_BTD

    def _behind(self, body: Body, states: torch.Tensor) -> torch.Tensor:
        """The prompt that encoder states were made from."""
        known = [states] if states in self._made_from else [self._last, *self._made_from.keys()]
        for one in known:
            rows = None if one is None or one not in self._made_from else _places(states, one)
            if rows is None:
                continue
            prompt_BD = self._made_from[one]
            if prompt_BD is not None:
                return prompt_BD.index_select(0, rows.to(prompt_BD.device))
            if not self._tap:
                return pooled(self._pooling, None, body)
        raise IncompatibleError(
            "this router decides on the prompt as the bare base model sees it, and these encoder outputs are none "
            f"that {'it' if self._tap else 'it or the bare base model'} was seen to make; give input_ids"
        )

    def _read(self, body: Body, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The last hidden states, or the tapped target's input, of the prompt in the bare base model."""
        if not self._tap:
            hidden, _ = base_pass(self._attached, module, args, kwargs, cached=False)
            return pooled(self._pooling, hidden, body)
        with tapped(self._attached.layers[self._tap]) as inputs:
            base_pass(self._attached, module, args, kwargs, cached=False)
        return pooled(self._pooling, inputs[-1], body)


def _places(states: torch.Tensor, known: torch.Tensor) -> torch.Tensor | None:
    """Which row of ``known`` each row of ``states`` is; None where one is none of them."""
    if states is known:
        return torch.arange(len(states), device=states.device)
    if states.shape[1:] != known.shape[1:] or (states.device, states.dtype) != (known.device, known.dtype):
        return None
    same = (states[:, None, 0] == known[None, :, 0]).all(-1)
    rows = same.int().argmax(1)
    return rows if bool(same.any(1).all()) and torch.equal(states, known[rows]) else None
