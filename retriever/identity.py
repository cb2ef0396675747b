"""What makes two encoders the same: SHA-256 over weights, tokenizer and pooling, independent of device and folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_STATE_OF_CALLS = ("truncation", "padding")
"""Parts of a fast tokenizer's JSON that its calls change; the lengths they hold are in the settings."""


def fingerprint_of(model: nn.Module, tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an encoder.

    Args:
        model: Its weights enter by name, dtype, shape and bytes; weights of attached adapters do not.
        tokenizer: A Transformers tokenizer.
        settings: Pooling, normalisation, lengths: everything else that changes a vector; JSON values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model)):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    digest.update(_tokenizer_text(tokenizer).encode())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's saved tensors under the names they have without adapters, adapters' own left out.

    A layer that stands in for another holds it as ``base_layer`` (attached banks, PEFT).
    """
    stand_ins = [name for name, module in model.named_modules() if _is_stand_in(module)]
    for name, tensor in model.state_dict().items():
        inside = [stand_in for stand_in in stand_ins if name.startswith(f"{stand_in}.")]
        if all(name.startswith(f"{stand_in}.base_layer.") for stand_in in inside):
            yield name.replace(".base_layer.", "."), tensor


def carries_adapters(model: nn.Module) -> bool:
    """Whether any layer of the model stands in for another one."""
    return any(_is_stand_in(module) for module in model.modules())


def _is_stand_in(module: nn.Module) -> bool:
    return "base_layer" in module._modules


def _tokenizer_text(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    parts = json.loads(fast.to_str())
    return json.dumps({name: part for name, part in parts.items() if name not in _STATE_OF_CALLS}, sort_keys=True)
