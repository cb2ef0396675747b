"""What a batch of items runs in: a router that is told what it may know, coefficients per row, or nothing.

Shape letters: ``B`` rows, ``T`` tokens, ``E`` experts, ``G`` sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Coefficients, Combine
from compose.errors import IncompatibleError
from compose.evaluation.controls import Transform
from compose.fewshot.scoring import Around, ScoredBatch
from compose.routers.records import MixedExample
from compose.routers.routed import RoutedModel
from compose.routers.train_data import TextEmbedding


def prompt_columns(batch: ScoredBatch) -> torch.Tensor:
    """Return bool ``(B, T)``: columns that hold the prompts; the rest of a row is its response."""
    longest = max(len(row.prompt) for row in batch.rows)
    if batch.left:
        return torch.ones(len(batch.rows), longest, dtype=torch.bool)
    lengths = torch.tensor([len(row.prompt) for row in batch.rows])
    return torch.arange(longest) < lengths[:, None]


def told_of(
    routed: RoutedModel, records: Sequence[MixedExample], text_embedding: TextEmbedding | None
) -> dict[str, torch.Tensor]:
    """What a router may be told of records, by what its gates read.

    Raises:
        IncompatibleError: Its gates read what the records do not have.
    """
    gate_input = routed.spec.gate_input
    if gate_input == "task_id":
        numbers = {task: number for number, task in enumerate(routed.router.tasks)}
        unknown = sorted({record.task for record in records} - set(numbers))
        if unknown:
            raise IncompatibleError(
                f"the router was not trained on task {unknown[0]!r}; it knows {', '.join(numbers)}"
            )
        return {"task_ids": torch.tensor([numbers[record.task] for record in records])}
    if gate_input == "cluster_id":
        if missing := [record.task for record in records if record.cluster is None]:
            raise IncompatibleError(f"the router reads clusters, and records have none (task {missing[0]!r})")
        return {"cluster_ids": torch.tensor([record.cluster for record in records])}
    if gate_input == "text":
        if text_embedding is None:
            raise IncompatibleError("the router reads text embeddings; give text_embedding")
        return {"text_embedding": text_embedding([record.example.input for record in records])}
    return {}


def routed_rows(routed: RoutedModel, said: Mapping[str, torch.Tensor], transform: Transform | None = None) -> Around:
    """Run batches with a router; its sequence gates see prompts only.

    Args:
        routed: The mixture.
        said: What it is told of every item: ``task_ids``, ``cluster_ids``, ``text_embedding``; first dimension: items.
        transform: An ablation.
    """

    @contextmanager
    def around(batch: ScoredBatch) -> Iterator[None]:
        rows = torch.tensor(batch.indices)
        told: dict[str, Any] = {name: values[rows].to(routed.device) for name, values in said.items()}
        if not routed.config.is_encoder_decoder:
            told["prompt_mask"] = prompt_columns(batch)
        with routed.told(**told):
            routed.enable()
            if transform is None:
                yield
                return
            with routed.transformed(transform):
                yield

    return around


def adapter_rows(attached: AttachedModel, names: Sequence[str | None]) -> Around:
    """Run every item with the adapter named for it."""
    return lambda batch: attached.using([names[index] for index in batch.indices])


def fixed(attached: AttachedModel, coefficients: Coefficients | None) -> Around:
    """Run every item with the same coefficients; None: the bare base model."""
    return lambda batch: attached.using(coefficients)


def weighted_rows(
    attached: AttachedModel, values_GNE: torch.Tensor, groups: Mapping[str, int], *, combine: Combine = "outputs"
) -> Around:
    """Run item ``n`` with the coefficients ``values[:, n]``, per group of targets."""

    def around(batch: ScoredBatch) -> AbstractContextManager[Any]:
        return attached.using(Coefficients(values_GNE[:, list(batch.indices)].contiguous(), combine, groups))

    return around
