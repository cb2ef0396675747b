"""Bodies: the stacks of layers of a model (one, or an encoder and a decoder) in the current forward.

Shape letters: ``B`` rows, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.context import RoutingContext
from compose.routers.pooling import pool
from compose.routers.sites import Site


@dataclass
class Body:
    """One stack of layers in the current forward.

    Attributes:
        decodes: Whether it is the decoder of an encoder-decoder model.
        past: Tokens in its cache before this forward.
        context: The batch's context, completed by the model's inputs.
        encoder: Hidden states of the encoder, for a decoder.
        encoder_mask: Their padding mask.
    """

    decodes: bool = False
    past: int = 0
    context: RoutingContext = field(default_factory=RoutingContext)
    encoder: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None


def pooled(how: str, hidden: torch.Tensor | None, body: Body) -> torch.Tensor:
    """``(B, D)``: the prompt's hidden states as one vector: the encoder's, for a decoder."""
    if body.decodes:
        if body.encoder is None:
            raise IncompatibleError("the decoder got no encoder_hidden_states, so a gate per sequence has no prompt")
        context = RoutingContext(attention_mask=body.encoder_mask)
        return pool(how, body.encoder, context.real(body.encoder.shape[0], body.encoder.shape[1], body.encoder.device))
    assert hidden is not None  # noqa: S101 - bodies without an encoder hand their hidden states on
    return pool(how, hidden, body.context.prompt(hidden.shape[0], hidden.shape[1], hidden.device))


def is_decoder_of_two(model: Any, path: str) -> bool:
    """Whether the body at a path is the decoder of an encoder-decoder model."""
    two = getattr(model.config, "is_encoder_decoder", False)
    return bool(two) and "decoder" in path.split(".")


def first_block(model: Any, site: Site) -> str:
    """Path of the first layer of the site's body."""
    body = model.get_submodule(site.body)
    for name, module in body.named_children():
        if isinstance(module, nn.ModuleList) and len(module):
            return f"{site.body}.{name}.0" if site.body else f"{name}.0"
    raise IncompatibleError(f"{site.body or 'the model'!r} has no list of layers whose input a gate could read")
