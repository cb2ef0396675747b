"""The pass of the bare base model that X-LoRA's gates read, with a key-value cache of its own.

X-LoRA (arXiv:2402.07148) computes gates from the hidden states of the model without adapters. The pass runs the layers
only: no head, no loss. While tokens are generated both passes keep a cache. That of the base pass is made of further
layers of the *same* cache object, so what generation does to a cache (reordering for beams, repeating, cropping)
happens to both, and nothing of the session's own has to be kept in step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError


def past_length(cache: Any) -> int:
    """Tokens that a cache holds; 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def base_pass(
    attached: Any, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, cached: bool = True
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Run ``body`` without adapters and gradients.

    Args:
        attached: The attached model.
        body: The module that holds the layers.
        args: Its positional inputs.
        kwargs: Its named inputs.
        cached: Whether the pass keeps a cache for later tokens; False for what is decided on the prompt alone.

    Returns:
        The last hidden states ``(B, T, D)``, and the named inputs for the pass with adapters: where a cache is wanted
        and none was given, with a new one that holds both passes.

    Raises:
        IncompatibleError: The cache is not of a kind that grows by layers, or was filled without this pass.
    """
    kwargs = dict(kwargs)
    if not cached:
        own = {"past_key_values": None, "use_cache": False, "labels": None}
        inner = {**kwargs, **{key: value for key, value in own.items() if key in kwargs}}
        if "use_cache" in _parameters(body):
            inner["use_cache"] = False
        return _run(attached, body, args, inner), kwargs
    cache, wanted = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if wanted is None:  # a cache that nobody asked for is filled where somebody may go on with it
        wanted = getattr(getattr(body, "config", None), "use_cache", False) and not torch.is_grad_enabled()
    training = body.training and torch.is_grad_enabled() and getattr(body, "gradient_checkpointing", False)
    if cache is None and wanted and not training and "past_key_values" in _parameters(body):
        cache = kwargs["past_key_values"] = _new_cache(body)
    inner = dict(kwargs)
    if cache is not None:
        inner["past_key_values"] = partner = _partner(cache, body)
        if past_length(partner) != past_length(cache):
            raise IncompatibleError(
                f"the cache holds {past_length(cache)} tokens, and the pass of the bare base model that gates read "
                f"saw {past_length(partner)} of them; fill the cache with this router in force, or start without one"
            )
    if "labels" in inner:
        inner.pop("labels")
    return _run(attached, body, args, inner), kwargs


def _run(attached: Any, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The last hidden states of the bare base model."""
    with torch.no_grad(), attached.using(None):
        output = body(*args, **kwargs)
    return output if isinstance(output, torch.Tensor) else output[0]


def _parameters(body: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(body.forward).parameters)


def _new_cache(body: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    own = DynamicCache(config=body.config)
    if getattr(body.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(own, DynamicCache(config=body.config))
    return own


def _partner(cache: Any, body: Any, *, grows: bool = True) -> Any:
    """A cache over the layers behind the model's own, which are added where they are missing.

    ``grows``: Whether tokens are added one by one; those of an encoder are written once.
    """
    from transformers import Cache, DynamicCache, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        pair = EncoderDecoderCache(
            _partner(cache.self_attention_cache, body), _partner(cache.cross_attention_cache, body, grows=False)
        )
        pair.is_updated = dict.fromkeys(range(_depth(body)), pair.cross_attention_cache.get_seq_length() > 0)
        return pair
    if not isinstance(cache, DynamicCache):
        raise IncompatibleError(
            f"two passes need a dynamic cache, got {type(cache).__name__}; leave cache_implementation out"
        )
    depth = _depth(body)
    for _ in range(2 * depth - len(cache.layers)):
        cache.layers.append(_layer_like(cache, body, grows=grows))
    return Cache(layers=cache.layers[depth : 2 * depth])


def _depth(body: Any) -> int:
    for module in body.children():
        if isinstance(module, nn.ModuleList) and len(module):
            return len(module)
    raise IncompatibleError(f"{type(body).__name__} has no list of layers; a gate from a base pass needs one")


def _layer_like(cache: Any, body: Any, *, grows: bool) -> Any:
    """A new layer of the kind that stands at the same place of the model's own."""
    from transformers.cache_utils import DynamicLayer

    from compose.kernels.growing_layer import GrowingLayer

    own = cache.layers[len(cache.layers) - _depth(body)] if len(cache.layers) >= _depth(body) else None
    if own is None or type(own) in (DynamicLayer, GrowingLayer):
        return GrowingLayer() if grows else DynamicLayer()
    raise IncompatibleError(f"two passes cannot keep a {type(own).__name__}; use a model with full attention")
