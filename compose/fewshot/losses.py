"""Response losses of a live model: mean token cross-entropy of each response, independent of batch and padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from compose.text.encoding import Encoded, pad


def response_losses(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    """Mean cross-entropy of every row's response tokens, given its prompt.

    Decoder-only rows are padded on the right with their own last token: causal attention never looks there, so no
    mask is needed and the fast attention path stays open. Logits are computed at response positions only.

    Args:
        model: A Transformers causal or encoder-decoder model; coefficients, if any, are set for these rows.
        rows: ``B`` encoded examples.

    Returns:
        ``(B,)`` float32, with a graph when gradients are enabled.
    """
    if model.config.is_encoder_decoder:
        return _encoder_decoder_losses(model, rows)
    return _decoder_losses(model, rows)


def _decoder_losses(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    device = model.device
    ids, _ = pad([[*row.prompt, *row.response] for row in rows], fill=None)
    first = min(len(row.prompt) for row in rows) - 1
    width = ids.shape[1] - 1
    labels = torch.full((len(rows), width - first), -100)
    for index, row in enumerate(rows):
        start = len(row.prompt) - 1 - first
        labels[index, start : start + len(row.response)] = torch.tensor(row.response)
    inputs = ids[:, :-1].to(device)
    if _accepts(model, "logits_to_keep"):
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=width - first).logits
    else:
        logits = model(input_ids=inputs, use_cache=False).logits[:, first:]
    return _mean_per_row(logits, labels.to(device))


def _encoder_decoder_losses(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    device = model.device
    ids, mask = pad([row.prompt for row in rows], fill=model.config.pad_token_id or 0)
    labels, label_mask = pad([row.response for row in rows], fill=0)
    labels = labels.masked_fill(label_mask == 0, -100).to(device)
    decoder_ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
    logits = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), decoder_input_ids=decoder_ids, use_cache=False
    ).logits
    return _mean_per_row(logits, labels)


def _mean_per_row(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    losses = functional.cross_entropy(
        logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=-100, reduction="none"
    )
    return losses.sum(1) / (labels_BT != -100).sum(1)


def _accepts(model: Any, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
