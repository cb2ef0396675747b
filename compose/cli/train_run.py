"""Running what ``compose train`` was asked for: inputs, plan, run folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import compose
from compose.cli.console import note
from compose.cli.loading import load_base
from compose.cli.train_progress import TrainProgress
from compose.cli.train_request import TrainRequest
from compose.errors import ComposeError, IncompatibleError
from compose.fewshot.run_folder import RunFolder

if TYPE_CHECKING:
    from compose.fewshot.loading import LoadedModel

HISTORY, RECIPE, SUMMARY, CHECKPOINTS = "history.jsonl", "recipe.json", "train.json", "checkpoints"
TRACE, REPORT = "trace.json", "report.html"

MEASURED, MEASURED_PER_TASK = 256, 16
"""Records whose gates are measured after training: at most so many, and of every task."""


class TrainInputs(NamedTuple):
    """What every run of a request works on."""

    loaded: LoadedModel
    bank: Any
    records: list[Any]


def plan_run(request: TrainRequest) -> dict[str, Any]:
    """Return what the first run would do; see `compose.routers.train_plan.plan_of`."""
    from compose.routers.train_plan import plan_of

    inputs = load_inputs(request)
    with opened(request, inputs, request.recipe.seeds[0]) as run:
        return {
            **plan_of(run),
            "seeds": list(request.recipe.seeds),
            "bank": [str(path) for path in request.recipe.bank],
        }


def run_all(request: TrainRequest, *, command: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train once for every seed and return the summaries, in order.

    Raises:
        ComposeError: Inputs that do not fit, folders that are taken; nothing is written then.
    """
    pending = {seed: folder for seed, folder in request.folders().items() if not _is_done(request, folder)}
    folders = {seed: RunFolder(folder, resume=request.resume, force=request.force) for seed, folder in pending.items()}
    inputs = load_inputs(request) if pending else None
    for seed, folder in folders.items():
        assert inputs is not None  # noqa: S101 - there is a pending run
        with opened(request, inputs, seed) as run:
            _train(request, run, inputs.loaded, folder, command)
    return [json.loads((folder / SUMMARY).read_text()) for folder in request.folders().values()]


def load_inputs(request: TrainRequest) -> TrainInputs:
    """Load bank, records and model, the cheap ones first.

    Raises:
        ComposeError: Any of them is not there or not readable; bad records are all named with their lines.
    """
    from compose.bank import Bank
    from compose.routers.records import read_mixed

    recipe = request.recipe
    bank = Bank.open(list(recipe.bank)) if recipe.bank else None
    experts = None if bank is None else bank.names
    records = read_mixed(list(recipe.data), columns=recipe.columns, experts=experts)
    return TrainInputs(load_base(recipe.base, device=request.device, dtype=recipe.precision), bank, records)


@contextmanager
def opened(request: TrainRequest, inputs: TrainInputs, seed: int) -> Iterator[Any]:
    """A run over the base model with its bank attached; both are taken off at the end."""
    from compose.bank import Bank
    from compose.engine.attach import attach
    from compose.routers.builder import build
    from compose.routers.stages import Stage
    from compose.routers.train_data import prepare
    from compose.routers.train_settings import TrainSettings
    from compose.routers.training import Run

    recipe, (spec, fresh) = request.recipe, request.configured
    model = inputs.loaded.model
    bank = inputs.bank
    if bank is None:
        bank = Bank.from_adapters(_fresh(fresh, spec, model, seed), base=str(recipe.base))
    stages = recipe.stages or (Stage(name="train", epochs=1),)
    settings = TrainSettings(
        batch_size=recipe.batch_size, accumulation=recipe.accumulation, sampling=recipe.sampling, seed=seed,
        max_length=recipe.max_length, truncate=recipe.truncate, checkpoint_every=request.checkpoint_every,
    )  # fmt: skip
    what = {spec.train if stage.train == "preset" else stage.train for stage in stages}
    own_factors = spec.structure in ("lora", "ffn") and bool(what & {"experts", "both"})
    records = inputs.records if inputs.bank is not None else _without_labels(inputs.records, bank.names)
    data = prepare(
        records, inputs.loaded.tokenizer, inputs.loaded.prompt_format, config=model.config, spec=spec,
        experts=bank.names, settings=settings,
    )  # fmt: skip
    attached = attach(model, bank, trainable=own_factors)
    try:
        routed = build(attached, spec, tasks=data.tasks, clusters=data.clusters, seed=seed)
        yield Run(routed, data, stages, settings)
    finally:
        attached.detach()


def _fresh(fresh: Any, spec: Any, model: Any, seed: int) -> list[Any]:
    """The experts that a preset trains from scratch, on the layers that it routes."""
    import re

    from compose.routers.experts import linear_targets

    targets = [target for target in linear_targets(model) if re.search(spec.targets, target)]
    if not targets:
        raise ComposeError(f"the model has no linear layers whose path contains {spec.targets!r}")
    return fresh.make(model, targets, seed=seed)


def _without_labels(records: list[Any], experts: Sequence[str]) -> list[Any]:
    """Records for experts that are made anew: labels that all name adapters of a bank say nothing of these."""
    labels = {record.expert for record in records if record.expert is not None}
    if not labels or labels & set(experts):
        return records
    note(f"the records' expert labels ({len(labels)} names) are left out: this preset trains experts of its own")
    return [replace(record, expert=None) for record in records]


def _is_done(request: TrainRequest, folder: Path) -> bool:
    return request.resume and (folder / SUMMARY).is_file()


def _train(request: TrainRequest, run: Any, loaded: LoadedModel, folder: RunFolder, command: Sequence[str]) -> None:
    """Train one run, in ``OUT.partial``, and publish its folder."""
    from compose.routers.saved import mixture_files
    from compose.routers.train_plan import trained

    folder.begin()
    history = folder.partial / HISTORY
    with TrainProgress(f"{request.recipe.preset} (seed {run.settings.seed})") as progress, history.open("a") as stream:
        run.progress = _both(progress, lambda report: print(json.dumps(report.entry()), file=stream, flush=True))
        run.train(folder.partial / CHECKPOINTS, resume=request.resume)
    recipe = replace(request.recipe, seeds=(run.settings.seed,), out=folder.path)
    summary = {
        "version": compose.__version__,
        "command": list(command),
        "preset": run.routed.spec.preset,
        "seed": run.settings.seed,
        "folder": str(folder.path),
        "steps": run.plan.total,
        "trained_parameters": trained(run),
        "tasks": list(run.data.tasks),
        "records": len(run.data.rows),
        "first": run.history[0],
        "last": run.history[-1],
    }
    files = mixture_files(run.routed)
    files[HISTORY] = "".join(json.dumps(entry) + "\n" for entry in run.history).encode()
    files[RECIPE] = (json.dumps(recipe.to_json(), indent=1) + "\n").encode()
    files[SUMMARY] = (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode()
    folder.publish({**files, **_pages(request, run, loaded)})
    note(f"wrote {folder.path}")


def _pages(request: TrainRequest, run: Any, loaded: LoadedModel) -> dict[str, bytes]:
    """What the router decides on a sample of its records, as trace and page; nothing where it cannot be measured."""
    from compose.evaluation.measure import measure_routing
    from compose.report.routing_data import course_of
    from compose.report.routing_html import render_routing

    recipe, sample = request.recipe, _sample(run.data.examples)
    about = {"preset": recipe.preset, "base": str(recipe.base), "records": f"{len(sample)} that it was trained on"}
    try:
        trace = measure_routing(
            run.routed, loaded, sample, max_length=recipe.max_length, truncate=recipe.truncate, about=about
        )
    except IncompatibleError as error:
        note(f"no {REPORT}: {error}", "yellow")
        return {}
    page = render_routing(trace, course_of(run.history, trace.experts))
    return {TRACE: (json.dumps(trace.to_json(), allow_nan=False) + "\n").encode(), REPORT: page.encode()}


def _sample(examples: Sequence[Any]) -> list[Any]:
    """The first records of every task, as many of each."""
    by_task: dict[str, list[Any]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    each = min(MEASURED_PER_TASK, max(1, MEASURED // len(by_task)))
    return [example for group in by_task.values() for example in group[:each]]


def _both(*progress: Callable[[Any], None]) -> Callable[[Any], None]:
    def tell(report: Any) -> None:
        for one in progress:
            one(report)

    return tell
