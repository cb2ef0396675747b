"""Greedy generation from token ids, with whatever coefficients are in force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def generate_tokens(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """Continue every prompt greedily until a stop token or ``max_new_tokens``.

    Prompts of a decoder-only model are padded on the left. Rows are independent of each other, up to rounding.

    Args:
        model: A Transformers causal or encoder-decoder model.
        prompts: ``B`` rows of token ids.
        max_new_tokens: Upper limit of new tokens per row.
        stop_ids: Token ids that end a row; never part of the result.

    Returns:
        ``B`` rows of new token ids.
    """
    encoder_decoder = model.config.is_encoder_decoder
    width = max(len(prompt) for prompt in prompts)
    fill = model.generation_config.pad_token_id
    fill = stop_ids[0] if fill is None else fill
    ids = torch.full((len(prompts), width), fill)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if encoder_decoder else slice(width - len(prompt), width)
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    with torch.no_grad():
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=list(stop_ids),
            pad_token_id=fill,
        )
    start = 1 if encoder_decoder else width
    return [_until_stop(row, set(stop_ids)) for row in generated[:, start:].tolist()]


def _until_stop(row: list[int], stop_ids: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop_ids), len(row))
    return row[:end]
