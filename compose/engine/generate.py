"""Generation from token ids, with whatever coefficients are in force."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch

from compose.errors import IncompatibleError

_OWN_OPTIONS = {
    "attention_mask": "give it inside inputs",
    "decoder_input_ids": "the model's own start token is used",
    "eos_token_id": "give stop_ids",
    "input_ids": "give it as inputs",
    "inputs": "give token ids",
    "inputs_embeds": "give token ids",
    "max_length": "give max_new_tokens",
    "return_dict_in_generate": "token ids alone are returned",
    "stop_strings": "give stop_ids",
    "stopping_criteria": "give stop_ids",
}


_SEEN = (
    "assistant_model", "cache_implementation", "custom_generate", "generation_config", "logits_processor",
    "past_key_values", "prefix_allowed_tokens_fn", "streamer",
)  # fmt: skip
"""Options by which tensors come to others, who may want to write to them, or gradients through them."""


def generate_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    inference_mode: bool = True,
    **options: Any,
) -> list[list[int]]:
    """Continue every prompt until a stop token or ``max_new_tokens``; greedily, unless the options say otherwise.

    Prompts of a decoder-only model are padded on the left. Rows are independent of each other, up to rounding.

    Args:
        model: A Transformers causal or encoder-decoder model.
        prompts: ``B`` rows of token ids.
        max_new_tokens: Upper limit of new tokens per row.
        stop_ids: Token ids that end a row; never part of the result.
        inference_mode: Whether the model runs in torch's inference mode, a twentieth faster on a CPU. False where
            hooks keep tensors that are written to or differentiated later. It does not, either, where an option hands
            its tensors to others (a cache, processors of logits, a generation config), nor where the model's own
            settings name a kind of cache, which some releases of Transformers keep for later calls.
        options: Further options of ``model.generate``: ``do_sample``, ``temperature``, ``num_beams`` ...

    Returns:
        ``B`` rows of new token ids; with ``num_return_sequences`` that many per prompt, next to each other.

    Raises:
        IncompatibleError: An option would change what comes in or out.
    """
    refused = sorted(set(options) & set(_OWN_OPTIONS))
    if refused:
        raise IncompatibleError(f"{refused[0]} cannot be passed on to generate: {_OWN_OPTIONS[refused[0]]}")
    encoder_decoder = model.config.is_encoder_decoder
    fill = pad_id(model, stop_ids)
    ids, mask = padded(prompts, fill, left=not encoder_decoder, device=model.device)
    alone = inference_mode and not _seen_by_others(model, options)
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": fill, **options}
    if not stop_ids:  # then no row ends before the others; beams take 0 for none and look for a stop token
        settings["pad_token_id"] = settings["pad_token_id"] or 1
    with torch.inference_mode() if alone else torch.no_grad(), _room_in_caches(model, options):
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            **settings,
        )
    start = 1 if encoder_decoder else ids.shape[1]
    return [_until_stop(row, set(stop_ids)) for row in generated[:, start:].tolist()]


def _seen_by_others(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether an option hands tensors out, or a model keeps a cache of its kind for later calls, not all ours."""
    keeps = model.generation_config.cache_implementation is not None
    return keeps or any(options.get(name) is not None for name in _SEEN)


@contextmanager
def _room_in_caches(model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """Have the cache of a call take new tokens without copying the others: on a CPU, where none is given.

    With beams all states are copied for every token anyway. A compiled call would be compiled again for the hook.
    """
    given = options.get("past_key_values") is not None or options.get("num_beams", 1) != 1
    if given or model.device.type != "cpu" or getattr(model, "_compiled_call_impl", None) is not None:
        yield
        return
    from compose.kernels.growing_layer import make_room

    thread = get_ident()

    def before(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        if kwargs and get_ident() == thread:  # without them where it was taken off between being found and called
            make_room(kwargs.get("past_key_values"))

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def padded(
    prompts: Sequence[Sequence[int]], fill: int, *, left: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, both ``(B, T)`` int64."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), fill)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def pad_id(model: Any, stop_ids: Sequence[int]) -> int:
    """Return the token that fills what the mask hides: the model's own, else a stop token, else 0."""
    own = model.generation_config.pad_token_id
    return own if own is not None else next(iter(stop_ids), 0)


def default_stop_ids(model: Any) -> list[int]:
    """Return the end tokens of the model's generation settings."""
    found = model.generation_config.eos_token_id
    if found is None:
        return []
    return [found] if isinstance(found, int) else list(found)


def check_generates(model: Any) -> None:
    """Raise unless ``model`` is a Transformers model that generates.

    Raises:
        IncompatibleError: It is not.
    """
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "generation_config"):
        raise IncompatibleError(
            f"{type(model).__name__} does not generate; attach the bank to a causal or encoder-decoder "
            "Transformers model (AutoModelForCausalLM, AutoModelForSeq2SeqLM)"
        )


def token_rows(inputs: Any) -> list[list[int]]:
    """Return ``B`` rows of token ids without padding.

    Args:
        inputs: ``B`` lists of token ids of any lengths; a tensor ``(B, T)``; or a mapping (a tokenizer's
            ``BatchEncoding``) with ``input_ids`` and optionally ``attention_mask``, whose zeros are left out.

    Raises:
        IncompatibleError: It is none of these, or a row has no tokens.
    """
    mask = None
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise IncompatibleError(f"inputs have no input_ids, only {', '.join(map(str, inputs)) or 'nothing'}")
        inputs, mask = inputs["input_ids"], inputs.get("attention_mask")
    rows = [_row(row) for row in _plain(inputs)]
    if mask is not None:
        kept = [_row(row) for row in _plain(mask)]
        if [len(row) for row in kept] != [len(row) for row in rows]:
            raise IncompatibleError("attention_mask and input_ids differ in shape")
        rows = [
            [token for token, keep in zip(row, keeps, strict=True) if keep]
            for row, keeps in zip(rows, kept, strict=True)
        ]
    empty = [number for number, row in enumerate(rows) if not row]
    if empty or not rows:
        raise IncompatibleError(f"row {empty[0]} has no tokens" if empty else "inputs have no rows")
    return rows


def _row(row: Any) -> list[int]:
    tokens = _plain(row)
    if not isinstance(tokens, Sequence) or not all(isinstance(token, int) for token in tokens):
        raise IncompatibleError("inputs must be rows of token ids, one list of integers per row; tokenise texts first")
    return list(tokens)


def _plain(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values


def _until_stop(row: list[int], stop_ids: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]
