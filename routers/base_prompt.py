"""BasePrompt: the prompt as the bare base model sees it, read once per batch; a decoder decides on its encoder's.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.bodies import Body, pooled
from compose.routers.context import repeat_rows
from compose.routers.first_pass import base_pass
from compose.routers.taps import tapped


class BasePrompt:
    """Reads prompts, and knows which encoder states were made from the last one."""

    def __init__(self, attached: Any, pooling: str, tap: str) -> None:
        self._attached, self._pooling, self._tap = attached, pooling, tap
        self._prompt_BD: torch.Tensor | None = None
        self._states_BTD: torch.Tensor | None = None

    def of(self, body: Body, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """``(B, D)``: the prompt of the batch that ``body``, which is ``module``, is called with.

        Encoder states that were made without the router are a prompt by themselves, but not a tapped one.

        Raises:
            IncompatibleError: A decoder got no such states, or the gate taps a layer that did not run.
        """
        if not body.decodes:
            self._prompt_BD, self._states_BTD = self._read(body, module, args, kwargs), None
            return self._prompt_BD
        if body.encoder is not None and self._prompt_BD is not None and self._made(body.encoder):
            return repeat_rows(self._prompt_BD, len(body.encoder))
        if self._tap:
            raise IncompatibleError(
                f"this gate reads the input of {self._tap!r} in the encoder, and these encoder outputs were made "
                "while the router was not in force; give input_ids in place of encoder_outputs"
            )
        return pooled(self._pooling, None, body)

    def encoded(self, states_BTD: torch.Tensor) -> None:
        """Say what the encoder made of the prompt that was read last."""
        self._states_BTD = states_BTD.detach()

    def _made(self, states: torch.Tensor) -> bool:
        """Whether states are the encoder's last, each row perhaps several times (beams)."""
        known = self._states_BTD
        if known is None or states.shape[1:] != known.shape[1:] or len(states) % len(known):
            return False
        if states.data_ptr() == known.data_ptr() and states.shape == known.shape:
            return True
        return torch.equal(states, repeat_rows(known, len(states)))

    def _read(self, body: Body, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The last hidden states, or the tapped target's input, of the prompt in the bare base model."""
        if not self._tap:
            hidden, _ = base_pass(self._attached, module, args, kwargs, cached=False)
            return pooled(self._pooling, hidden, body)
        with tapped(self._attached.layers[self._tap]) as inputs:
            base_pass(self._attached, module, args, kwargs, cached=False)
        return pooled(self._pooling, inputs[-1], body)
