"""Rows in the middle of their generation: one padded cache that rows join and leave between the model's calls.

Keys and values of all running rows lie in one Transformers cache, padded on the left to the longest row and hidden by
the mask; positions count each row's own tokens. For an encoder-decoder model the keys and values of the encoder's
outputs are padded on the right.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compose.engine.generate import check_generates, pad_id, padded
from compose.errors import IncompatibleError

_RELATIVE = ("t5", "mt5", "umt5")
_GREEDY: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "remove_invalid_values": (None, False),
    "watermarking_config": (None,),
}


@dataclass
class RunningRows:
    """The state of ``B`` rows that have seen up to ``T`` tokens.

    Attributes:
        cache: Keys and values, ``DynamicCache`` or ``EncoderDecoderCache``.
        mask_BT: 1 where a row has a token; zeros on the left.
        source_mask_BS: For an encoder-decoder model: 1 where the encoder's input has a token; zeros on the right.
    """

    cache: Any
    mask_BT: torch.Tensor
    source_mask_BS: torch.Tensor | None = None

    def join(self, other: RunningRows) -> None:
        """Append the rows of ``other``, which is used up."""
        width = max(self.mask_BT.shape[1], other.mask_BT.shape[1])
        for mine, theirs in zip(_own_layers(self.cache), _own_layers(other.cache), strict=True):
            mine.keys = torch.cat([_left(mine.keys, width), _left(theirs.keys, width)])
            mine.values = torch.cat([_left(mine.values, width), _left(theirs.values, width)])
            _give_up_room(mine)
        self.mask_BT = torch.cat([_left(self.mask_BT[..., None], width), _left(other.mask_BT[..., None], width)])[
            ..., 0
        ]
        if self.source_mask_BS is None or other.source_mask_BS is None:
            return
        width = max(self.source_mask_BS.shape[1], other.source_mask_BS.shape[1])
        for mine, theirs in zip(_source_layers(self.cache), _source_layers(other.cache), strict=True):
            mine.keys = torch.cat([_right(mine.keys, width), _right(theirs.keys, width)])
            mine.values = torch.cat([_right(mine.values, width), _right(theirs.values, width)])
        masks = [_right(mask[..., None], width) for mask in (self.source_mask_BS, other.source_mask_BS)]
        self.source_mask_BS = torch.cat(masks)[..., 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Let all rows but these leave, and drop the padding that only the others needed."""
        index = torch.tensor(rows, device=self.mask_BT.device)
        mask = self.mask_BT[index]
        used = slice(mask.shape[1] - int(mask.sum(1).max()), None)
        self.mask_BT = mask[:, used]
        for layer in _own_layers(self.cache):
            layer.keys, layer.values = layer.keys[index][:, :, used], layer.values[index][:, :, used]
            _give_up_room(layer)
        if self.source_mask_BS is None:
            return
        source = self.source_mask_BS[index]
        used = slice(0, int(source.sum(1).max()))
        self.source_mask_BS = source[:, used]
        for layer in _source_layers(self.cache):
            layer.keys, layer.values = layer.keys[index][:, :, used], layer.values[index][:, :, used]


def check_rows_can_move(model: Any) -> None:
    """Raise unless rows of ``model`` can join and leave a running batch and get exactly what they get alone.

    Raises:
        IncompatibleError: The model does not generate; it is an encoder-decoder outside the T5 family, whose decoder
            counts positions by the length of the cache; it takes no positions; it keeps a state other than keys and
            values; or its generation settings change greedy choices.
    """
    check_generates(model)
    kind, alternative = model.config.model_type, "give fixed batches to attached.generate instead"
    if model.config.is_encoder_decoder:
        if kind not in _RELATIVE:
            raise IncompatibleError(
                f"rows of {kind!r} cannot join a running batch: of the encoder-decoder models only those with "
                f"relative positions can ({', '.join(_RELATIVE)}); {alternative}"
            )
    else:
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise IncompatibleError(
                f"rows of {kind!r} cannot join a running batch: it takes no positions; {alternative}"
            )
        _check_cache(model, alternative)
    for name, harmless in _GREEDY.items():
        value = getattr(model.generation_config, name, None)
        if value not in harmless:
            raise IncompatibleError(
                f"the model's generation_config has {name}={value!r}, which a running batch does not apply; "
                f"set it to None, or {alternative}"
            )


def most_positions(model: Any) -> int | None:
    """Return how many positions a row may use without changing its neighbours; ``None``: any number.

    Rotary embeddings of the kinds ``dynamic`` and ``longrope`` change for the whole batch beyond the length that the
    model was first trained for.
    """
    config = model.config
    if config.is_encoder_decoder:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") if rope.get("rope_type") in ("dynamic", "longrope") else None
    return first or getattr(config, "max_position_embeddings", None)


def start_rows(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, RunningRows]:
    """Run ``B`` prompts in one call: scores of the first new token ``(B, V)``, and the rows to go on with."""
    from transformers import DynamicCache, EncoderDecoderCache

    from compose.kernels.growing_layer import make_room

    encoder_decoder = model.config.is_encoder_decoder
    ids, mask = padded(prompts, pad_id(model, ()), left=not encoder_decoder, device=model.device)
    cache: Any = DynamicCache()
    if ids.device.type == "cpu":
        make_room(cache)
    if encoder_decoder:
        cache = EncoderDecoderCache(cache, DynamicCache())
        first = ids.new_full((len(prompts), 1), _start_id(model))
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=first, past_key_values=cache, use_cache=True)
        return out.logits[:, -1], RunningRows(cache, torch.ones_like(first), mask)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **last
    )
    return out.logits[:, -1], RunningRows(cache, mask)


def step_rows(model: Any, rows: RunningRows, tokens_B: torch.Tensor) -> torch.Tensor:
    """Give every row its newest token in one call; return the scores of the next one ``(B, V)``."""
    from transformers.modeling_outputs import BaseModelOutput

    mask = torch.cat([rows.mask_BT, rows.mask_BT.new_ones(len(rows.mask_BT), 1)], dim=1)
    common = {"past_key_values": rows.cache, "use_cache": True}
    if rows.source_mask_BS is None:
        positions = mask.sum(1, keepdim=True) - 1
        out = model(input_ids=tokens_B[:, None], attention_mask=mask, position_ids=positions, **common)
    else:
        # Only the shape of the encoder's outputs is read: their keys and values are in the cache.
        source = torch.zeros(1, 1, 1, dtype=model.dtype, device=mask.device)
        source = source.expand(*rows.source_mask_BS.shape, model.config.hidden_size)
        out = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=source),
            attention_mask=rows.source_mask_BS,
            decoder_input_ids=tokens_B[:, None],
            decoder_attention_mask=mask,
            **common,
        )
    rows.mask_BT = mask
    return out.logits[:, -1]


def _check_cache(model: Any, alternative: str) -> None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=model.config).layers
    other = [type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if other:
        raise IncompatibleError(
            f"rows of {model.config.model_type!r} cannot join a running batch: it keeps more than keys and values "
            f"({other[0]}); {alternative}"
        )


def _start_id(model: Any) -> int:
    settings = (model.generation_config.decoder_start_token_id, model.config.decoder_start_token_id)
    found = next((token for token in settings if token is not None), None)
    if found is None:
        raise IncompatibleError("the model names no decoder_start_token_id; set it in model.generation_config")
    return found


def _own_layers(cache: Any) -> list[Any]:
    return getattr(cache, "self_attention_cache", cache).layers


def _source_layers(cache: Any) -> list[Any]:
    return cache.cross_attention_cache.layers


def _give_up_room(layer: Any) -> None:
    """Free what replaced states leave behind (`GrowingLayer`)."""
    if hasattr(layer, "give_up_room"):
        layer.give_up_room()


def _left(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad ``(..., T, D)`` with zeros on the left of ``T``."""
    return nn.functional.pad(x, (0, 0, width - x.shape[-2], 0))


def _right(x: torch.Tensor, width: int) -> torch.Tensor:
    """Pad ``(..., S, D)`` with zeros on the right of ``S``."""
    return nn.functional.pad(x, (0, 0, 0, width - x.shape[-2]))
