"""TrainData: mixed-task records, encoded, with what routers read of their texts; batches by step.

Shape letters: ``N`` records, ``B`` rows, ``D`` width of text embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compose.errors import IncompatibleError
from compose.routers.collate import Collator, EncodedMixed, TokenLabels, encode_mixed
from compose.routers.records import MixedExample, mixed_hash, task_names
from compose.routers.sampling import TaskSampler
from compose.routers.spec import MixtureSpec
from compose.routers.stages import Plan, Stage
from compose.routers.train_settings import TrainSettings
from compose.text.encoding import PromptFormat

TextEmbedding = Callable[[Sequence[str]], torch.Tensor]
"""Texts -> their embeddings ``(N, D)`` by an encoder outside of the model."""


@dataclass(frozen=True)
class TrainData:
    """Encoded records.

    Attributes:
        examples: In order.
        rows: The same as numbers.
        collator: Makes batches.
        tasks: Names, in the order of task ids.
        text_ND: float32 embeddings of the prompts; None where no gate reads them.
    """

    examples: Sequence[MixedExample]
    rows: Sequence[EncodedMixed]
    collator: Collator
    tasks: tuple[str, ...]
    text_ND: torch.Tensor | None = None

    @property
    def clusters(self) -> int:
        """One more than the highest cluster number; 0 where records have none."""
        return 1 + max(row.cluster_id for row in self.rows)

    @property
    def text_features(self) -> int:
        """``D``; 0 where there are no embeddings."""
        return 0 if self.text_ND is None else self.text_ND.shape[1]

    def hash(self) -> str:
        """SHA-256 over records and how they are encoded."""
        return mixed_hash(self.examples)

    def batch(self, numbers: Sequence[int], device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
        """Return the inputs of a routed model for some records, and how many tokens they predict."""
        batch = self.collator([self.rows[number] for number in numbers])
        inputs = {**batch.model_inputs(), **batch.routing_inputs()}
        if self.text_ND is not None:
            inputs["text_embedding"] = self.text_ND[list(numbers)]
        if self.collator.encoder_decoder:
            del inputs["prompt_mask"]  # the encoder reads nothing but the prompt
        return {name: value.to(device) for name, value in inputs.items()}, batch.num_targets


def prepare(
    examples: Sequence[MixedExample],
    tokenizer: Any,
    prompt_format: PromptFormat,
    *,
    config: Any,
    spec: MixtureSpec,
    experts: Sequence[str],
    settings: TrainSettings,
    tasks: Sequence[str] | None = None,
    text_embedding: TextEmbedding | None = None,
) -> TrainData:
    """Encode records for training.

    Args:
        examples: Records.
        tokenizer: The model's.
        prompt_format: How an example becomes text.
        config: The model's configuration.
        spec: What gates and losses read decides which labels and embeddings are made.
        experts: Names of the bank's adapters, in order.
        settings: Lengths.
        tasks: Names in the order of task ids; None: those of the records, sorted.
        text_embedding: For gates that read texts.

    Raises:
        ExamplesError: Records cannot be encoded; all are named.
        IncompatibleError: There are no records, or gates or losses read what records do not have.
    """
    _check_records(examples)
    names = task_names(examples) if tasks is None else tuple(tasks)
    rows = encode_mixed(
        examples, tokenizer, prompt_format, encoder_decoder=config.is_encoder_decoder, tasks=names, experts=experts,
        max_length=settings.max_length, truncate=settings.truncate,
    )  # fmt: skip
    _check_reads(spec, examples, text_embedding)
    collator = Collator(
        pad_token_id=config.pad_token_id or 0, encoder_decoder=config.is_encoder_decoder, token_labels=_labels(spec)
    )
    text_ND = None
    if spec.gate_input == "text" and text_embedding is not None:
        text_ND = _embedded([each.example.input for each in examples], text_embedding)
    return TrainData(examples, rows, collator, names, text_ND)


def _check_records(examples: Sequence[object]) -> None:
    if not examples:
        raise IncompatibleError("there are no records to train on")
    for each in examples:
        if not isinstance(each, MixedExample):
            raise IncompatibleError(
                f"records must be MixedExample, got {type(each).__name__}; compose.routers.read_mixed reads files"
            )


@dataclass(frozen=True)
class StageData:
    """The records of one stage.

    Attributes:
        stage: The stage.
        sampler: Its batches.
    """

    stage: Stage
    sampler: TaskSampler


def plan_stages(
    examples: Sequence[MixedExample], stages: Sequence[Stage], settings: TrainSettings
) -> tuple[Plan, list[StageData]]:
    """Return the run's plan, and each stage's records with their order.

    Raises:
        IncompatibleError: A stage has no records, or its batches cannot be.
    """
    found = []
    for stage in stages:
        sampler = TaskSampler(
            examples,
            stage.sampling or settings.sampling,
            batch_size=stage.batch_size or settings.batch_size,
            accumulation=stage.accumulation or settings.accumulation,
            seed=stage.seed(settings.seed),
            keep=stage.select(examples),
        )
        found.append(StageData(stage, sampler))
    steps = [
        one.sampler.num_steps(one.stage.epochs) if one.stage.epochs is not None else one.stage.steps or 0
        for one in found
    ]
    return Plan(tuple(stages), tuple(steps)), found


def fingerprint(data: TrainData, plan: Plan, settings: TrainSettings) -> dict[str, Any]:
    """What has to be the same for a run to be continued, as plain values."""
    own = {name: value for name, value in settings.to_json().items() if name not in ("checkpoint_every", "log_every")}
    stages = [asdict(stage) for stage in plan.stages]
    plain = {"data": data.hash(), "tasks": data.tasks, "steps": plan.steps, "stages": stages, "settings": own}
    return dict(json.loads(json.dumps(plain)))


def _labels(spec: MixtureSpec) -> TokenLabels:
    """Decisions of tokens are labelled where they are made, if a loss reads labels."""
    readers = [loss for loss in spec.losses if loss.needs_labels]
    if not readers or spec.scope != "token":
        return "none"
    return "all" if any(loss.over == "real" for loss in readers) else "response"


def _check_reads(spec: MixtureSpec, examples: Sequence[MixedExample], text_embedding: TextEmbedding | None) -> None:
    problems = []
    if spec.gate_input == "cluster_id":
        without = [each for each in examples if each.cluster is None]
        if without:
            problems.append(
                f"gates read clusters, and {len(without)} records have none (first: {without[0].place or 'unknown'}); "
                "add a field 'cluster' to each, by k-means over embeddings of the texts"
            )
    if spec.gate_input == "text" and text_embedding is None:
        problems.append("gates read text embeddings: give text_embedding, a function from texts to (N, D)")
    if any(loss.needs_labels for loss in spec.losses) and not any(each.expert for each in examples):
        problems.append(
            "a loss reads expert labels, and no record has one; add a field 'expert' with an adapter's name"
        )
    if problems:
        raise IncompatibleError("; ".join(problems))


def _embedded(texts: Sequence[str], embed: TextEmbedding) -> torch.Tensor:
    found = embed(texts)
    if found.dim() != 2 or len(found) != len(texts) or not bool(torch.isfinite(found).all()):
        raise IncompatibleError(
            f"text_embedding must return finite numbers (N, D) for {len(texts)} texts, got {tuple(found.shape)}"
        )
    return found.detach().float().cpu()
