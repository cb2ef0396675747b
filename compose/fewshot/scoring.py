"""Scores on test items: exact match of generated text, response loss, option log-likelihood, and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from compose.engine.generate import generate_tokens
from compose.fewshot.loading import LoadedModel
from compose.fewshot.losses import response_losses
from compose.text.encoding import Encoded, encode, end_ids
from compose.text.examples import Example

ROWS = 128
"""Rows scored in one batch."""


@dataclass(frozen=True)
class Scores:
    """Results per item, in the items' order.

    Attributes:
        exact: ``(n,)`` bool: the generated text equals the output, white space at the ends aside.
        losses: ``(n,)`` mean token cross-entropy of the output, or ``None`` where nothing is scored by a model.
        options: ``(n,)`` bool: the output has the highest log-likelihood of the item's choices; ``None`` unless every
            item has choices.
        texts: The generated texts.
    """

    exact: np.ndarray
    losses: np.ndarray | None
    options: np.ndarray | None
    texts: tuple[str, ...]


class Interval(NamedTuple):
    """A mean and its bootstrap interval (95 %)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoredBatch:
    """A batch that is about to run.

    Attributes:
        indices: Its items.
        rows: The same, encoded.
        left: Whether prompts are padded on the left and alone (generation); else responses follow them, padded on the
            right (losses).
    """

    indices: tuple[int, ...]
    rows: tuple[Encoded, ...]
    left: bool


Around = Callable[[ScoredBatch], AbstractContextManager[Any]]
"""Returns a context manager to run a batch in."""


@torch.no_grad()
def score(loaded: LoadedModel, items: Sequence[Example], around: Around = lambda batch: nullcontext()) -> Scores:
    """Score the model as it stands now, with whatever coefficients are in force for the whole batch.

    Args:
        loaded: The model.
        items: The examples.
        around: What every batch of items runs in: it may put coefficients per row into force.
    """
    losses, texts, stops = [], [], stop_ids(loaded)
    encoder_decoder = loaded.model.config.is_encoder_decoder
    encoded = encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    longest = max(len(item.response) for item in encoded)
    order = sorted(range(len(items)), key=lambda index: (encoded[index].length, index))
    options = _option_hits(loaded, items) if all(item.choices for item in items) else None
    for start in range(0, len(order), ROWS):
        indices = tuple(order[start : start + ROWS])
        rows = tuple(encoded[index] for index in indices)
        with around(ScoredBatch(indices, rows, left=False)):
            losses.append(response_losses(loaded.model, rows).cpu())
        with around(ScoredBatch(indices, rows, left=True)):
            new_ids = generate_tokens(
                loaded.model, [row.prompt for row in rows], max_new_tokens=longest + 2, stop_ids=stops
            )
        texts += loaded.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    back = np.argsort(order)
    in_order = tuple(texts[index] for index in back)
    exact = np.array([text.strip() == item.output.strip() for text, item in zip(in_order, items, strict=True)])
    return Scores(exact, torch.cat(losses).double().numpy()[back], options, in_order)


def constant_scores(items: Sequence[Example], answer: str) -> Scores:
    """Score one and the same answer on every item."""
    exact = np.array([item.output.strip() == answer.strip() for item in items])
    return Scores(exact, None, None, (answer,) * len(items))


def interval(values: np.ndarray, *, samples: int, seed: int) -> Interval:
    """Mean and 95 % percentile bootstrap interval; for a paired comparison pass the differences per item."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), size=(samples, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5]) if samples else (np.nan, np.nan)
    return Interval(float(values.mean()), float(low), float(high))


def stop_ids(loaded: LoadedModel) -> list[int]:
    """Token ids that end a response: the end-of-text token, and the last one of the response suffix."""
    return end_ids(loaded.tokenizer, loaded.prompt_format)


def _option_hits(loaded: LoadedModel, items: Sequence[Example]) -> np.ndarray:
    """Whether the output is the likeliest choice (summed log-likelihood; the first of equals wins)."""
    variants = [Example(item.input, choice, (), item.messages) for item in items for choice in item.choices]
    encoder_decoder = loaded.model.config.is_encoder_decoder
    encoded = encode(variants, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    order = sorted(range(len(encoded)), key=lambda index: (encoded[index].length, index))
    totals = np.empty(len(encoded))
    for start in range(0, len(order), ROWS):
        indices = order[start : start + ROWS]
        rows = [encoded[index] for index in indices]
        losses = response_losses(loaded.model, rows)
        totals[indices] = losses.double().cpu().numpy() * [len(row.response) for row in rows]
    hits, position = [], 0
    for item in items:
        count = len(item.choices)
        best = int(np.argmin(totals[position : position + count]))
        hits.append(item.choices[best] == item.output)
        position += count
    return np.array(hits)
