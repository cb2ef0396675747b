"""compare: a trained router beside what it has to beat, on the same items.

The contenders: the bare base model; the uniform average of the bank; the best merge by loss on other items; the oracle
(every item with the adapter of its own task); one LoRA trained on the same data with at least as many parameters; and
of the router itself: its gates averaged per task and told the task, in random order, and taken from another row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.coefficients import Coefficients
from compose.errors import IncompatibleError
from compose.evaluation.around import adapter_rows, fixed, routed_rows, weighted_rows
from compose.evaluation.controls import gates_of_other_rows, random_gates
from compose.evaluation.merges import MERGES, best_merge
from compose.evaluation.result import Row, TaskScore
from compose.evaluation.task_gates import task_gates
from compose.fewshot.loading import LoadedModel
from compose.fewshot.scoring import Around, score
from compose.routers.experts import fresh_experts, linear_widths
from compose.routers.presets.single_lora import none_r
from compose.routers.records import MixedExample
from compose.routers.routed import RoutedModel
from compose.routers.stages import Stage
from compose.routers.train import train
from compose.routers.train_settings import TrainSettings

TextEmbedding = Callable[[Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class RouterRun:
    """A router to score.

    Attributes:
        name: In the table; runs of one name are seeds of one contender.
        seed: It was trained with.
        open: Puts it on the base model; its ``attached.detach()`` takes it off.
        trained: Parameters that were trained; None: those that train now.
    """

    name: str
    seed: int
    open: Callable[[], RoutedModel]
    trained: int | None = None


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How the one LoRA is trained that a router has to beat: on the same records, for the same steps.

    Attributes:
        records: Training records.
        stages: As the router's, at least one; all of them train the LoRA.
        settings: Of training; the seed is replaced.
        seeds: One run each.
        learning_rate: Of the LoRA.
        parameters: It gets the lowest rank that has at least as many; None: as many as the first router trained.
        targets: It stands on; None: the bank's.
    """

    records: Sequence[MixedExample]
    stages: Sequence[Stage]
    settings: TrainSettings = field(default_factory=TrainSettings)
    seeds: Sequence[int] = (0, 1, 2)
    learning_rate: float = 1e-3
    parameters: int | None = None
    targets: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Items:
    """What is scored, and the records that may choose (merges, mean gates).

    Attributes:
        test: Scored.
        choosing: Not scored; empty: no merge and no mean gates.
        text_embedding: For routers that read texts.
    """

    test: Sequence[MixedExample]
    choosing: Sequence[MixedExample] = ()
    text_embedding: TextEmbedding | None = None


def compare(
    loaded: LoadedModel,
    bank: Bank | None,
    runs: Sequence[RouterRun],
    items: Items,
    *,
    baseline: Baseline | None = None,
    merges: Sequence[str] = tuple(MERGES),
    merge_rank: int = 64,
    ablations: bool = True,
    seed: int = 0,
) -> Iterator[Row]:
    """Score all contenders, one after the other; rows come as they are done.

    Args:
        loaded: The bare base model.
        bank: The adapters; None for mixtures that hold their experts: then there are no bank's references.
        runs: Routers.
        items: Examples.
        baseline: How the one LoRA is trained; None: there is none.
        merges: Merge methods that compete; empty: none.
        merge_rank: Rank of their results.
        ablations: Whether the router's ablations are scored.
        seed: Of random gates.
    """
    scorer = _Scorer(loaded, items)
    if bank is not None:
        yield from _references(scorer, bank)
        if merges and items.choosing:
            yield _merge(scorer, bank, merges, merge_rank)
    parameters = None
    for run in runs:
        with _opened(run) as routed:
            own = sum(parameter.numel() for parameter in routed.trained_parameters().values())
            trained = own if run.trained is None else run.trained
            parameters = parameters or trained
            yield from _router(scorer, run, routed, trained)
            if ablations:
                yield from _ablations(scorer, run, routed, seed)
    if baseline is not None:
        yield from _one_lora(scorer, bank, baseline, baseline.parameters or parameters or 1)


class _Scorer:
    """Scores the items in whatever they run in, by task."""

    def __init__(self, loaded: LoadedModel, items: Items) -> None:
        if not items.test:
            raise IncompatibleError("there are no items to score")
        self.loaded = loaded
        self.items = items
        self.examples = [item.example for item in items.test]
        self.tasks = [item.task for item in items.test]

    def row(self, around: Around, name: str, kind: str, *, only: Sequence[bool] | None = None, **more: Any) -> Row:
        """The row of one contender; ``only``: items that count."""
        scores = score(self.loaded, self.examples, around)
        assert scores.losses is not None  # noqa: S101 - a model scored them
        tasks = {}
        for task in dict.fromkeys(self.tasks):
            chosen = np.array([t == task and (only is None or only[i]) for i, t in enumerate(self.tasks)])
            if chosen.any():
                tasks[task] = TaskScore(float(scores.exact[chosen].mean()), float(scores.losses[chosen].mean()))
        return Row(name, kind, tasks=tasks, **more)


@contextmanager
def _opened(run: RouterRun) -> Iterator[RoutedModel]:
    routed = run.open().eval()
    try:
        yield routed
    finally:
        routed.attached.detach()


def _references(scorer: _Scorer, bank: Bank) -> Iterator[Row]:
    owners = [_owner(item, bank) for item in scorer.items.test]
    with attach(scorer.loaded.model, bank) as attached:
        yield scorer.row(fixed(attached, None), "base", "reference")
        uniform = Coefficients(torch.full((len(bank),), 1.0 / len(bank)))
        yield scorer.row(fixed(attached, uniform), "uniform average", "reference")
        has_owner = [owner is not None for owner in owners]
        if any(has_owner):
            missing = sorted({item.task for item in scorer.items.test if _owner(item, bank) is None})
            about = f"no adapter for {', '.join(missing)}" if missing else ""
            around = adapter_rows(attached, owners)
            yield scorer.row(around, "oracle adapters", "reference", only=has_owner, about=about)


def _owner(item: MixedExample, bank: Bank) -> str | None:
    """The adapter that an item names, or that has the name of its task."""
    name = item.expert or item.task
    return name if name in bank else None


def _merge(scorer: _Scorer, bank: Bank, methods: Sequence[str], rank: int) -> Row:
    examples = [item.example for item in scorer.items.choosing]
    best = best_merge(scorer.loaded, bank, examples, rank=rank, methods=methods)
    with attach(scorer.loaded.model, Bank.from_adapters([best.adapter])) as attached:
        around = fixed(attached, Coefficients(torch.tensor([best.scale])))
        return scorer.row(around, "best merge", "reference", about=best.about)


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


def _router(scorer: _Scorer, run: RouterRun, routed: RoutedModel, trained: int) -> Iterator[Row]:
    about = {"seed": run.seed, "trained": trained}
    try:
        said = told_of(routed, scorer.items.test, scorer.items.text_embedding)
    except IncompatibleError as error:
        yield Row(run.name, "router", skipped=str(error), **about)
        return
    yield scorer.row(routed_rows(routed, said), run.name, "router", **about)


def _ablations(scorer: _Scorer, run: RouterRun, routed: RoutedModel, seed: int) -> Iterator[Row]:
    """Of routers whose gates depend on the input."""
    if routed.spec.scope == "static" or routed.spec.combine == "parameters" or routed.mixer.structures:
        return
    try:
        said = told_of(routed, scorer.items.test, scorer.items.text_embedding)
        told = told_of(routed, scorer.items.choosing, scorer.items.text_embedding)
    except IncompatibleError:
        return
    if scorer.items.choosing:
        yield _told_the_task(scorer, run, routed, told)
    random = random_gates(routed.router, seed + run.seed)
    transforms = {"gates in random order": random, "gates of other rows": gates_of_other_rows()}
    for name, transform in transforms.items():
        around = routed_rows(routed, said, transform)
        yield scorer.row(around, f"{run.name}: {name}", "ablation", seed=run.seed)


def _told_the_task(scorer: _Scorer, run: RouterRun, routed: RoutedModel, said: Mapping[str, torch.Tensor]) -> Row:
    """The router's gates averaged per task: an oracle knows the task, nothing looks at tokens."""
    records, name = scorer.items.choosing, f"{run.name}: mean gates, told the task"
    numbers = {task: number for number, task in enumerate(dict.fromkeys(record.task for record in records))}
    if missing := sorted(set(scorer.tasks) - set(numbers)):
        return Row(name, "ablation", seed=run.seed, skipped=f"no records to average over for {', '.join(missing)}")
    examples = [record.example for record in records]
    tasks = [numbers[record.task] for record in records]
    found = task_gates(routed, scorer.loaded, examples, tasks, num_tasks=len(numbers), said=said)
    values_GNE = found.rows([numbers[task] for task in scorer.tasks])
    around = weighted_rows(routed.attached, values_GNE, found.groups)
    return scorer.row(around, name, "ablation", seed=run.seed)


def _one_lora(scorer: _Scorer, bank: Bank | None, baseline: Baseline, parameters: int) -> Iterator[Row]:
    model = scorer.loaded.model
    targets = list(baseline.targets or (bank.targets if bank is not None else ()))
    per_rank = sum(sum(linear_widths(model, target)) for target in targets)
    if not per_rank:
        raise IncompatibleError("the one LoRA needs targets; give a bank or targets")
    rank = max(1, -(-parameters // per_rank))
    spec = none_r(rank).spec
    for seed in baseline.seeds:
        adapters: list[Adapter] = fresh_experts(
            model, targets, num_experts=1, rank=rank, alpha=2.0 * rank, seed=seed, names=["one"]
        )
        with attach(model, Bank.from_adapters(adapters), trainable=True) as attached:
            settings = replace(baseline.settings, seed=seed)
            routed = train(
                attached, spec, baseline.records, tokenizer=scorer.loaded.tokenizer,
                prompt_format=scorer.loaded.prompt_format, stages=_for_experts(baseline), settings=settings,
            ).routed.eval()  # fmt: skip
            yield scorer.row(
                routed_rows(routed, {}), f"one LoRA of rank {rank}", "baseline", seed=seed, trained=rank * per_rank
            )


def _for_experts(baseline: Baseline) -> list[Stage]:
    return [replace(stage, train="experts", learning_rate=baseline.learning_rate) for stage in baseline.stages]
