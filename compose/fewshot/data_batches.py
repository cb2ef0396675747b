"""Examples as batches of model arguments, for merges with data (`compose.engine.data_merge`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compose.fewshot.loading import LoadedModel
from compose.text.encoding import Encoded, encode, pad
from compose.text.examples import Example

ROWS = 16
"""Examples in one batch."""


def data_batches(
    loaded: LoadedModel, examples: Sequence[Example], *, rows: int = ROWS
) -> list[dict[str, torch.Tensor]]:
    """Return the examples as ``input_ids``, ``attention_mask`` and ``labels``, int64 on the model's device.

    Padding is on the right. Labels are the token ids of the response (with its end token) and -100 elsewhere; of a
    decoder-only model they stand at their tokens' own positions, ``(B, T)``, of an encoder-decoder model alone.

    Args:
        loaded: Model, tokenizer and prompt format.
        examples: In order; a batch holds the next ``rows`` of them.
        rows: Per batch.

    Raises:
        ExamplesError: An example has no tokens in prompt or response.
    """
    encoder_decoder = loaded.model.config.is_encoder_decoder
    encoded = encode(examples, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    starts = range(0, len(encoded), rows)
    return [_batch(loaded, encoded[start : start + rows], encoder_decoder) for start in starts]


def _batch(loaded: LoadedModel, part: Sequence[Encoded], encoder_decoder: bool) -> dict[str, torch.Tensor]:
    fill = loaded.model.config.pad_token_id or 0
    if encoder_decoder:
        ids, mask = pad([row.prompt for row in part], fill=fill)
        labels, _ = pad([row.response for row in part], fill=-100)
    else:
        ids, mask = pad([[*row.prompt, *row.response] for row in part], fill=fill)
        labels, _ = pad([[*[-100] * len(row.prompt), *row.response] for row in part], fill=-100)
    named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(loaded.model.device) for name, tensor in named.items()}
