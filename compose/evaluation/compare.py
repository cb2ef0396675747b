"""compare: a trained router beside what it has to beat, on the same items.

The contenders: the bare base model; the uniform average of the bank; the best merge by loss on other items; the oracle
(every item with the adapter of its own task); one LoRA trained on the same data with at least as many parameters; and
of the router itself: its gates averaged per task and told the task, in random order, and taken from another row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.coefficients import Coefficients
from compose.errors import IncompatibleError
from compose.evaluation.around import adapter_rows, fixed, routed_rows, told_of, weighted_rows
from compose.evaluation.controls import gates_of_other_rows, random_gates
from compose.evaluation.merges import MERGES, best_merge
from compose.evaluation.result import ONE_LORA, TOLD, Row, TaskScore
from compose.evaluation.task_gates import task_gates
from compose.fewshot.loading import LoadedModel
from compose.fewshot.scoring import Around, score
from compose.routers.experts import fresh_experts, linear_widths
from compose.routers.presets.single_lora import none_r
from compose.routers.records import MixedExample
from compose.routers.routed import RoutedModel
from compose.routers.stages import Stage
from compose.routers.train_data import TextEmbedding
from compose.routers.train_settings import TrainSettings
from compose.routers.training import train


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
        learning_rate: Of the LoRA; None: the stages' own, of experts where they say one.
        parameters: It gets the lowest rank that has at least as many; None: as many as a router trained, one LoRA for
            each rank that this makes.
        targets: It stands on; None: the bank's; without a bank those of the first router's experts.
    """

    records: Sequence[MixedExample]
    stages: Sequence[Stage]
    settings: TrainSettings = field(default_factory=TrainSettings)
    seeds: Sequence[int] = (0, 1, 2)
    learning_rate: float | None = 1e-3
    parameters: int | None = None
    targets: Sequence[str] | None = None

    def rate(self, stage: Stage) -> float:
        """The LoRA's learning rate in a stage."""
        return self.learning_rate or stage.expert_learning_rate or stage.learning_rate


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


def compare(  # noqa: PLR0913 - one parameter per choice of the comparison
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
    kept: Sequence[Row] = (),
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
        kept: Rows of an interrupted comparison with the same arguments; they are not measured again.
    """
    scorer = _Scorer(loaded, items, kept)
    if bank is not None:
        yield from _references(scorer, bank)
        if merges and items.choosing:
            yield _merge(scorer, bank, merges, merge_rank)
    parameters, targets = dict[str, int](), list(bank.targets) if bank is not None else []
    for run in runs:
        with _opened(run) as routed:
            own = sum(parameter.numel() for parameter in routed.trained_parameters().values())
            trained = own if run.trained is None else run.trained
            parameters.setdefault(run.name, trained)
            targets = targets or list(routed.attached.layers)
            yield from _run(scorer, run, routed, trained, ablations=ablations, seed=seed)
    if baseline is not None:
        wanted = [baseline.parameters] if baseline.parameters is not None else list(parameters.values())
        yield from _one_lora(scorer, baseline, baseline.targets or targets, wanted)


def score_run(
    loaded: LoadedModel,
    routed: RoutedModel,
    items: Items,
    *,
    name: str,
    seed: int = 0,
    trained: int = 0,
    ablations: bool = True,
) -> Iterator[Row]:
    """Score a router that stands on the model, and its ablations.

    Args:
        loaded: The model it stands on.
        routed: The router, in evaluation mode.
        items: Examples.
        name: In the table.
        seed: It was trained with; also of random gates.
        trained: Parameters that were trained.
        ablations: Whether the ablations are scored.
    """
    run = RouterRun(name, seed, lambda: routed)
    yield from _run(_Scorer(loaded, items), run, routed, trained, ablations=ablations, seed=0)


def _run(
    scorer: _Scorer, run: RouterRun, routed: RoutedModel, trained: int, *, ablations: bool, seed: int
) -> Iterator[Row]:
    row = _router(scorer, run, routed, trained)
    yield row
    if ablations and not row.skipped:
        yield from _ablations(scorer, run, routed, seed)


class _Scorer:
    """Scores the items in whatever they run in, by task."""

    def __init__(self, loaded: LoadedModel, items: Items, kept: Sequence[Row] = ()) -> None:
        if not items.test:
            raise IncompatibleError("there are no items to score")
        self._kept = {(row.name, row.seed): row for row in kept}
        self.loaded = loaded
        self.items = items
        self.examples = [item.example for item in items.test]
        self.tasks = [item.task for item in items.test]

    def known(self, name: str, seed: int | None = None) -> Row | None:
        """The row of one contender, where an interrupted comparison has it."""
        return self._kept.get((name, seed))

    def row(self, around: Around, name: str, kind: str, *, only: Sequence[bool] | None = None, **more: Any) -> Row:
        """The row of one contender; ``only``: items that count."""
        if (known := self.known(name, more.get("seed"))) is not None:
            return known
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
    if (known := scorer.known("best merge")) is not None:
        return known
    examples = [item.example for item in scorer.items.choosing]
    try:
        best = best_merge(scorer.loaded, bank, examples, rank=rank, methods=methods)
    except IncompatibleError as error:
        return Row("best merge", "reference", skipped=str(error))
    with attach(scorer.loaded.model, Bank.from_adapters([best.adapter])) as attached:
        around = fixed(attached, Coefficients(torch.tensor([best.scale])))
        return scorer.row(around, "best merge", "reference", about=best.about)


def _router(scorer: _Scorer, run: RouterRun, routed: RoutedModel, trained: int) -> Row:
    try:
        said = told_of(routed, scorer.items.test, scorer.items.text_embedding)
        return scorer.row(routed_rows(routed, said), run.name, "router", seed=run.seed, trained=trained)
    except IncompatibleError as error:
        return Row(run.name, "router", seed=run.seed, trained=trained, skipped=str(error))


def _ablations(scorer: _Scorer, run: RouterRun, routed: RoutedModel, seed: int) -> Iterator[Row]:
    """Of routers whose gates depend on the input."""
    if routed.spec.scope == "static":
        return
    said = told_of(routed, scorer.items.test, scorer.items.text_embedding)
    if scorer.items.choosing:
        yield _told_the_task(scorer, run, routed)
    random = random_gates(routed.router, seed + run.seed)
    transforms = {"gates in random order": random, "gates of other rows": gates_of_other_rows()}
    for name, transform in transforms.items():
        around = routed_rows(routed, said, transform)
        yield scorer.row(around, f"{run.name}: {name}", "ablation", seed=run.seed)


def _told_the_task(scorer: _Scorer, run: RouterRun, routed: RoutedModel) -> Row:
    """The router's gates averaged per task: an oracle knows the task, nothing looks at tokens."""
    records, name = scorer.items.choosing, f"{run.name}: {TOLD}"
    if (known := scorer.known(name, run.seed)) is not None:
        return known
    numbers = {task: number for number, task in enumerate(dict.fromkeys(record.task for record in records))}
    if missing := sorted(set(scorer.tasks) - set(numbers)):
        return Row(name, "ablation", seed=run.seed, skipped=f"no records to average over for {', '.join(missing)}")
    examples = [record.example for record in records]
    tasks = [numbers[record.task] for record in records]
    try:
        said = told_of(routed, records, scorer.items.text_embedding)
        found = task_gates(routed, scorer.loaded, examples, tasks, num_tasks=len(numbers), said=said)
    except IncompatibleError as error:
        return Row(name, "ablation", seed=run.seed, skipped=str(error))
    values_GNE = found.rows([numbers[task] for task in scorer.tasks])
    around = weighted_rows(routed.attached, values_GNE, found.groups, combine=routed.spec.combine)
    return scorer.row(around, name, "ablation", seed=run.seed)


def _one_lora(scorer: _Scorer, baseline: Baseline, targets: Sequence[str], parameters: Sequence[int]) -> Iterator[Row]:
    """One LoRA for each rank that has as many parameters as are wanted, and seed."""
    per_rank = sum(sum(linear_widths(scorer.loaded.model, target)) for target in targets)
    if not per_rank:
        raise IncompatibleError("the one LoRA needs targets; give a bank or targets")
    records = [replace(record, expert=None) for record in baseline.records]  # labels name experts that are not here
    unlabelled = replace(baseline, records=records)
    for rank in dict.fromkeys(max(1, -(-count // per_rank)) for count in parameters or [1]):
        name, trained = f"{ONE_LORA} of rank {rank}", rank * per_rank
        if any(stage.experts for stage in baseline.stages):
            reason = "stages choose records by the expert's label, which one LoRA does not have; give other stages"
            yield Row(name, "baseline", trained=trained, skipped=reason)
            continue
        for seed in baseline.seeds:
            if (known := scorer.known(name, seed)) is not None:
                yield known
                continue
            try:
                with _trained_lora(scorer.loaded, targets, rank, unlabelled, seed) as routed:
                    row = scorer.row(routed_rows(routed, {}), name, "baseline", seed=seed, trained=trained)
            except IncompatibleError as error:
                row = Row(name, "baseline", seed=seed, trained=trained, skipped=str(error))
            yield row


@contextmanager
def _trained_lora(
    loaded: LoadedModel, targets: Sequence[str], rank: int, baseline: Baseline, seed: int
) -> Iterator[RoutedModel]:
    """One LoRA, trained as the baseline says, in force on the model."""
    adapters = fresh_experts(
        loaded.model, targets, num_experts=1, rank=rank, alpha=2.0 * rank, seed=seed, names=["one"]
    )
    with attach(loaded.model, Bank.from_adapters(adapters), trainable=True) as attached:
        yield train(
            attached, none_r(rank).spec, baseline.records, tokenizer=loaded.tokenizer,
            prompt_format=loaded.prompt_format, stages=_for_experts(baseline),
            settings=replace(baseline.settings, seed=seed),
        ).routed.eval()  # fmt: skip


def _for_experts(baseline: Baseline) -> list[Stage]:
    """The stages, all for the LoRA alone, at one rate each."""
    return [
        replace(stage, train="experts", learning_rate=baseline.rate(stage), expert_learning_rate=None)
        for stage in baseline.stages
    ]
