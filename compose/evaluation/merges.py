"""The best merge of a bank by its loss on items that are not tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.coefficients import Coefficients
from compose.engine.merge import merge
from compose.errors import IncompatibleError
from compose.fewshot.loading import LoadedModel
from compose.fewshot.losses import response_losses
from compose.text.encoding import encode
from compose.text.examples import Example

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors of a merge's mean-sized result that are tried."""

MERGES: Mapping[str, Mapping[str, Any]] = {"sum": {}, "ties": {}, "dare_ties": {}, "tsvm": {}}
"""Methods and options that compete; all at a common rank."""

ROWS = 64


class BestMerge(NamedTuple):
    """The adapter with the lowest loss, the factor it is used with, and what it is in words."""

    adapter: Adapter
    scale: float
    about: str


@torch.no_grad()
def best_merge(
    loaded: LoadedModel, bank: Bank, items: Sequence[Example], *, rank: int, methods: Sequence[str] = tuple(MERGES)
) -> BestMerge:
    """Merge the whole bank by every method and keep the one and the factor of lowest mean loss on ``items``.

    Args:
        loaded: The bare model; a merge is attached to it while it is scored.
        bank: The adapters, all at weight ``1 / E``, so that factor 1 is their average.
        items: Examples that are not tested on.
        rank: Every result is recompressed to it.
        methods: Names of merge methods; those that refuse this bank are left out, and ``about`` says so.

    Raises:
        IncompatibleError: All of them refuse it, or none is named.
        UnknownNameError: No such method.
    """
    weights = dict.fromkeys(bank.names, 1.0 / len(bank))
    encoder_decoder = loaded.model.config.is_encoder_decoder
    rows = encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    found: list[tuple[float, BestMerge]] = []
    refused: dict[str, str] = {}
    for method in methods:
        try:
            adapter = merge(bank, method, weights, rank=rank, **MERGES.get(method, {})).adapter
        except IncompatibleError as error:
            refused[method] = str(error)
            continue
        for scale in (scale * len(bank) ** 0.5 for scale in SCALES):
            with attach(loaded.model, Bank.from_adapters([adapter])) as attached:
                attached.set(Coefficients(torch.tensor([scale])))
                starts = range(0, len(rows), ROWS)
                parts = [response_losses(loaded.model, rows[start : start + ROWS]) for start in starts]
            loss = float(torch.cat(parts).mean())
            found.append((loss, BestMerge(adapter, scale, f"{method}, factor {scale:.2f}, rank {rank}")))
    if not found:
        raise IncompatibleError(
            "; ".join(f"{method}: {why}" for method, why in refused.items()) or "no merge is named"
        )
    _, best = min(found, key=lambda pair: pair[0])
    return best._replace(about=f"{best.about}; not for this bank: {', '.join(refused)}") if refused else best
