"""What a router decides over records, as a trace: sums by task, and a few texts with their experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from compose.evaluation.around import told_of
from compose.fewshot.loading import LoadedModel
from compose.routers.collate import Collator, EncodedMixed, Truncate, encode_mixed
from compose.routers.metrics import RoutingMeter
from compose.routers.records import MixedExample, task_names
from compose.routers.routed import RoutedModel
from compose.routers.token_strip import strip_of
from compose.routers.trace import RoutingTrace
from compose.routers.train_data import TextEmbedding
from compose.text.pieces import token_texts

ROWS = 32
"""Rows that are run in one batch."""


@torch.no_grad()
def measure_routing(
    routed: RoutedModel,
    loaded: LoadedModel,
    records: Sequence[MixedExample],
    *,
    text_embedding: TextEmbedding | None = None,
    texts: int = 6,
    max_length: int | None = None,
    truncate: Truncate = "refuse",
    about: Mapping[str, Any] | None = None,
) -> RoutingTrace:
    """Run a router over records, responses included, and add up what it decides; the mode it is in stays.

    Gates that decide nothing (always-on experts alone) leave no sums.

    Args:
        routed: The mixture, on the model.
        loaded: Tokenizer and prompt template.
        records: Any; a label of an expert that the mixture has counts as the right choice.
        text_embedding: For gates that read texts.
        texts: Tasks of which the first record is kept as a text with its experts.
        max_length: Most tokens of a record; None: any.
        truncate: What to do with longer ones.
        about: Goes into the trace.

    Raises:
        IncompatibleError: Gates read what records do not have.
        ExamplesError: A record cannot be encoded.
    """
    said = told_of(routed, records, text_embedding)
    router, two = routed.router, bool(routed.config.is_encoder_decoder)
    tasks = router.tasks if routed.spec.gate_input == "task_id" else task_names(records)
    known = [record if record.expert in router.experts else replace(record, expert=None) for record in records]
    rows = encode_mixed(
        known, loaded.tokenizer, loaded.prompt_format, encoder_decoder=two, tasks=tasks, experts=router.experts,
        max_length=max_length, truncate=truncate,
    )  # fmt: skip
    meter = RoutingMeter(router.experts, tasks)
    training = routed.training
    routed.eval()
    try:
        for start in range(0, len(rows), ROWS):
            places = list(range(start, min(start + ROWS, len(rows))))
            meter.update(_decisions(routed, [rows[place] for place in places], _part(said, places)))
        firsts = [[record.task for record in records].index(task) for task in task_names(records)[:texts]]
        for place in firsts:
            meter.keep(_strip(routed, loaded, rows[place], _part(said, [place]), records[place].task))
    finally:
        routed.train(training)
    if routed.spec.structure == "lora":
        meter.measure_experts(routed)
    return meter.trace(about)


def _part(said: Mapping[str, torch.Tensor], places: Sequence[int]) -> dict[str, torch.Tensor]:
    return {name: values[list(places)] for name, values in said.items()}


def _decisions(routed: RoutedModel, rows: Sequence[EncodedMixed], said: Mapping[str, torch.Tensor]) -> list[Any]:
    two = bool(routed.config.is_encoder_decoder)
    batch = Collator(pad_token_id=routed.config.pad_token_id or 0, encoder_decoder=two)(rows)
    inputs = {**batch.model_inputs(), **batch.routing_inputs(), **said}
    inputs.pop("prompt_mask" if two else "labels")  # an encoder reads the prompt alone; losses are not wanted
    with routed.recording() as decisions:
        routed(**{name: value.to(routed.device) for name, value in inputs.items()})
    return decisions


def _strip(
    routed: RoutedModel, loaded: LoadedModel, row: EncodedMixed, said: Mapping[str, torch.Tensor], task: str
) -> Any:
    """A text with its experts: prompt and response, or of an encoder-decoder what the encoder reads."""
    two = bool(routed.config.is_encoder_decoder)
    sites = [name for name, site in routed.router.layout.items() if "decoder" not in site.body.split(".")]
    pieces = token_texts(loaded.tokenizer, row.prompt if two else (*row.prompt, *row.response))
    decisions = _decisions(routed, [row], said)
    length = len(row.prompt)
    return strip_of(decisions, pieces, name=task, prompt_length=length, task=task, sites=sites if two else None)
