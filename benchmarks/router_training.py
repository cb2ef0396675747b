"""One mixture of the router study, trained or made ready on the demo's training records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from router_contenders import CONTENDERS, Contender

from compose.bank import Bank
from compose.engine.attach import attach
from compose.fewshot.loading import LoadedModel
from compose.routers.builder import build
from compose.routers.calibration import calibrate
from compose.routers.centroids import centroids
from compose.routers.collate import Collator, encode_mixed
from compose.routers.experts import linear_targets
from compose.routers.phatgoose import train_phatgoose_gates
from compose.routers.presets.registry import PRESETS, preset
from compose.routers.records import MixedExample, task_names
from compose.routers.routed import RoutedModel
from compose.routers.stages import Stage
from compose.routers.training import train
from compose.text.encoding import encode, pad

CLUSTERS = 36

Prepare = Callable[[Sequence[MixedExample]], Sequence[MixedExample]]
"""Adds to records what a mixture has to be told of them."""

CALIBRATION = 32
"""Records per expert for routers that are calibrated."""


@contextmanager
def router_run(
    name: str, loaded: LoadedModel, bank: Bank, records: Sequence[MixedExample], *, seed: int, steps: int, batch: int
) -> Iterator[tuple[RoutedModel, int, Prepare]]:
    """Yield the mixture, ready to be scored, how many parameters were trained, and what test records need.

    Afterwards it is taken off the model.
    """
    contender = CONTENDERS[name]
    spec = preset(contender.preset, **contender.options)
    if not contender.over_bank:
        fresh = PRESETS[contender.preset].experts
        assert fresh is not None  # noqa: S101 - presets over fresh experts have some
        bank = Bank.from_adapters(fresh.make(loaded.model, linear_targets(loaded.model), seed=seed))
        records = [replace(record, expert=None) for record in records]  # fresh experts have no task of their own
    prepare: Prepare = list
    if contender.prepare == "clusters":
        prepare = by_cluster(loaded, records, CLUSTERS)
        records = prepare(records)
    attached = attach(loaded.model, bank, trainable=spec.trains_experts)
    try:
        if spec.train == "none":
            routed = build(attached, spec, tasks=task_names(records), seed=seed)
            trained = _make_ready(contender, routed, loaded, records)
        else:
            stage = Stage(name=name, steps=steps, learning_rate=contender.learning_rate, schedule="linear")
            options = {"batch_size": batch, "seed": seed, "log_every": max(1, steps // 20)}
            routed = train(
                attached, spec, records, tokenizer=loaded.tokenizer, prompt_format=loaded.prompt_format,
                stages=[stage], **options,
            ).routed  # fmt: skip
            trained = sum(parameter.numel() for parameter in routed.trained_parameters().values())
        yield routed.eval(), trained, prepare
    finally:
        attached.detach()


def _make_ready(
    contender: Contender, routed: RoutedModel, loaded: LoadedModel, records: Sequence[MixedExample]
) -> int:
    """Fill the prototypes of a router that is not trained on mixed data; returns how many parameters were trained."""
    if not contender.prepare:
        return 0
    batches = _by_expert(routed, loaded, records)
    if contender.prepare == "phatgoose":
        train_phatgoose_gates(routed, batches)
        return sum(buffer.numel() for buffer in routed.router.buffers() if buffer.is_floating_point())
    calibrate(routed, batches)
    return 0


def _by_expert(
    routed: RoutedModel, loaded: LoadedModel, records: Sequence[MixedExample]
) -> dict[str, list[dict[str, Any]]]:
    """Two batches of every expert's own records."""
    collator = Collator(pad_token_id=loaded.model.config.pad_token_id or 0)
    found = {}
    for name in routed.router.experts:
        own = [record for record in records if record.expert == name][:CALIBRATION]
        rows = encode_mixed(own, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)
        halves = [collator(rows[::2]), collator(rows[1::2])]
        found[name] = [half.to(routed.device).model_inputs() for half in halves]
    return found


def by_cluster(loaded: LoadedModel, records: Sequence[MixedExample], count: int) -> Prepare:
    """Number records by the nearest of ``count`` centroids of the base model's mean hidden states of prompts."""
    base = loaded._replace(model=copy.deepcopy(loaded.model))  # the model itself is about to get a router
    means = centroids(prompt_features(base, records), count)

    def number(given: Sequence[MixedExample]) -> list[MixedExample]:
        nearest = torch.cdist(prompt_features(base, given).double(), means).argmin(1).tolist()
        return [replace(record, cluster=cluster) for record, cluster in zip(given, nearest, strict=True)]

    return number


@torch.no_grad()
def prompt_features(loaded: LoadedModel, records: Sequence[MixedExample]) -> torch.Tensor:
    """``(N, D)`` on the CPU: mean last hidden state of every prompt's tokens in the bare base model."""
    rows = encode(
        [record.example for record in records], loaded.tokenizer, loaded.prompt_format, encoder_decoder=False
    )
    parts = []
    for start in range(0, len(rows), 256):
        ids, mask = pad([row.prompt for row in rows[start : start + 256]], 0)
        ids, mask = ids.to(loaded.model.device), mask.to(loaded.model.device)
        hidden = loaded.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        parts.append(((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).float().cpu())
    return torch.cat(parts)
