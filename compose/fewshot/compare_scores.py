"""Scores of many coefficient vectors on many items: every row of a batch runs with its own, nothing is merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Coefficients
from compose.engine.generate import generate_tokens
from compose.fewshot.loading import LoadedModel
from compose.fewshot.losses import response_losses
from compose.fewshot.scoring import ROWS, stop_ids
from compose.text.encoding import encode
from compose.text.examples import Example


class RowScores(NamedTuple):
    """Per row: ``exact (n,)`` bool, the generated text is the output; ``losses (n,)`` float64 of the output."""

    exact: np.ndarray
    losses: np.ndarray


@torch.no_grad()
def score_rows(
    loaded: LoadedModel,
    attached: AttachedModel,
    items: Sequence[Example],
    which: np.ndarray,
    gates: np.ndarray,
    *,
    rows: int = ROWS,
) -> RowScores:
    """Score item ``which[i]`` under the coefficients ``gates[i]``, for every i.

    The same as `compose.fewshot.scoring.score` under one set of coefficients after the other, up to rounding.

    Args:
        loaded: The model, with the bank of ``E`` adapters attached to it.
        attached: The handle.
        items: Items.
        which: ``(n,)`` indices of items.
        gates: ``(n, E)``.
        rows: In one batch.
    """
    encoder_decoder = loaded.model.config.is_encoder_decoder
    encoded = encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    stops = stop_ids(loaded)
    longest = max(len(item.response) for item in encoded)
    order = sorted(range(len(which)), key=lambda row: (encoded[which[row]].length, row))
    exact, losses = np.zeros(len(which), dtype=bool), np.empty(len(which))
    for start in range(0, len(order), rows):
        places = order[start : start + rows]
        part = [encoded[which[place]] for place in places]
        with attached.using(Coefficients(torch.tensor(gates[places], dtype=torch.float32))):
            losses[places] = response_losses(loaded.model, part).double().cpu().numpy()
            found = generate_tokens(
                loaded.model, [row.prompt for row in part], max_new_tokens=longest + 2, stop_ids=stops
            )
        texts = loaded.tokenizer.batch_decode(found, skip_special_tokens=True)
        wanted = [items[which[place]].output.strip() for place in places]
        exact[places] = [text.strip() == output for text, output in zip(texts, wanted, strict=True)]
    return RowScores(exact, losses)
