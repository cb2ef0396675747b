"""Taps: one target whose input a gate reads in the pass of the bare base model, as LoGo does (arXiv:2511.07129)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError


def tap_target(attached: Any, pattern: str) -> str:
    """Return the last target, in module order, whose path contains ``pattern``; the encoder's, where there is one.

    Args:
        attached: The attached model.
        pattern: Regular expression.

    Raises:
        IncompatibleError: No target of the bank is of that name.
    """
    two = getattr(attached.model.config, "is_encoder_decoder", False)
    order = [path for path, _ in attached.model.named_modules(remove_duplicate=False) if path in attached.layers]
    readers = [path for path in order if not (two and "decoder" in path.split("."))]
    found = [path for path in readers if re.search(pattern, path)]
    if not found:
        raise IncompatibleError(
            f"tap {pattern!r} matches none of the {len(readers)} targets that see the prompt, "
            f"for example {readers[-1] if readers else 'none at all'!r}; name one of them with tap=..."
        )
    return found[-1]


@contextmanager
def tapped(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of ``module`` inside a ``with`` block, one entry per call."""
    inputs: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        hook.remove()
