"""Running what ``compose eval`` was asked for: inputs, rows as they come, files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import compose
from compose.cli.console import note
from compose.cli.eval_request import HISTORY, MIXTURE, EvalRequest, RouterFolder
from compose.cli.loading import load_base
from compose.errors import BackendUnavailableError, ComposeError, IncompatibleError
from compose.evaluation.result import Row, page_scores, row_from_json, summarise, task_means, verdicts
from compose.fewshot.run_folder import RunFolder
from compose.routers.records import MixedExample, mixed_hash, read_mixed, task_names

if TYPE_CHECKING:
    from compose.bank import Bank
    from compose.evaluation.compare import Baseline, RouterRun
    from compose.fewshot.loading import LoadedModel
    from compose.routers.routed import RoutedModel

ROWS, RESULT, REPORT, PICTURE, TRACE = "rows.jsonl", "result.json", "report.html", "routing.png", "trace.json"


class EvalInputs(NamedTuple):
    """What is read before the model is."""

    bank: Bank | None
    test: list[MixedExample]
    choosing: list[MixedExample]
    training: list[MixedExample]


def plan(request: EvalRequest) -> dict[str, Any]:
    """Return what would be compared, as plain values."""
    return _plan(request, load_inputs(request))


def _plan(request: EvalRequest, inputs: EvalInputs) -> dict[str, Any]:
    from compose.evaluation.merges import SCALES

    merging = bool(inputs.bank is not None and inputs.choosing)
    return {
        "base": request.base,
        "adapters": [] if inputs.bank is None else list(inputs.bank.names),
        "routers": [{**router._asdict(), "folder": str(router.folder)} for router in request.routers],
        "tasks": list(task_names(inputs.test)),
        "records": {"scored": len(inputs.test), "choosing": len(inputs.choosing), "training": len(inputs.training)},
        "merges": list(request.merges) if merging else [],
        "scales": list(SCALES) if merging else [],
        "one_lora": _one_lora(request, inputs),
        "ablations": request.ablations,
        "missing": missing(inputs),
        "warnings": warnings(inputs),
    }


def run(request: EvalRequest, *, command: Sequence[str] = ()) -> dict[str, Any]:
    """Compare, publish the folder and return its ``result.json``.

    Raises:
        ComposeError: Inputs that do not fit, or a folder that is taken; nothing is written then.
    """
    assert request.out is not None  # noqa: S101 - the request was checked
    folder = RunFolder(request.out, resume=request.resume, force=request.force)
    inputs = load_inputs(request)
    loaded = load_base(request.base, device=request.device, dtype=request.dtype)
    folder.begin()
    rows = list(_rows(request, inputs, loaded, folder))
    result = _result(request, inputs, rows, command)
    lines = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    folder.publish({ROWS: lines.encode(), RESULT: text.encode(), **_pictures(request, inputs, loaded, rows)})
    return result


def load_inputs(request: EvalRequest) -> EvalInputs:
    """Read bank and records.

    Raises:
        ComposeError: Any of them is not readable, or a router stands over a bank and there is none.
    """
    from compose.bank import Bank
    from compose.routers.saved_file import read_mixture

    bank = Bank.open(list(request.bank)) if request.bank else None
    for router in request.routers:
        if bank is None and read_mixture(router.folder).factors is None:
            raise ComposeError(f"--router: {router.folder} stands over a bank of adapters; give --bank DIR")
    experts = None if bank is None else bank.names

    def records(paths: Sequence[Path], split: str) -> list[MixedExample]:
        if not paths:
            return []
        return read_mixed(list(paths), columns=request.columns, experts=experts, split=split)

    training = records(request.train, "train")
    return EvalInputs(bank, records(request.data, "test"), records(request.choose, "validation"), training)


def missing(inputs: EvalInputs) -> list[str]:
    """What is left out for want of inputs."""
    found = []
    if inputs.bank is None:
        found.append("no --bank: no uniform average, no merge and no oracle adapters")
    elif not any((record.expert or record.task) in inputs.bank for record in inputs.test):
        found.append("no scored record names an adapter or has a task of an adapter's name: no oracle adapters")
    if not inputs.choosing:
        found.append("no --choose: no best merge and no gates per task")
    if not inputs.training:
        found.append("no --train: no one LoRA at equal trained parameters")
    return found


def warnings(inputs: EvalInputs) -> list[str]:
    """Records that are scored though they were used."""
    seen = {(record.example.input, record.example.output) for record in inputs.test}
    found = []
    for name, records in (("--choose", inputs.choosing), ("--train", inputs.training)):
        used = {(record.example.input, record.example.output) for record in records} & seen
        if used:
            found.append(f"{len(used)} of {len(seen)} scored records are in {name} as well: scores look too good")
    return found


def _rows(request: EvalRequest, inputs: EvalInputs, loaded: LoadedModel, folder: RunFolder) -> Iterator[Row]:
    """Every row, kept in the journal as soon as it is there; those of an interrupted comparison are read."""
    from compose.evaluation.compare import Items, compare

    head = {"comparison": _fingerprint(request, inputs)}
    kept = _kept(folder.events, head)
    known = {(row.name, row.seed) for row in kept}
    runs = [_router_run(router, loaded, inputs.bank) for router in request.routers]
    started = time.monotonic()
    with folder.events.open("a", encoding="utf-8") as stream:
        for row in compare(
            loaded, inputs.bank, runs, Items(test=inputs.test, choosing=inputs.choosing),
            baseline=_baseline(request, inputs), merges=request.merges, merge_rank=request.merge_rank,
            ablations=request.ablations, kept=kept,
        ):  # fmt: skip
            if (row.name, row.seed) not in known:
                stream.write(json.dumps(row.to_json()) + "\n")
                stream.flush()
                seed = "" if row.seed is None else f", seed {row.seed}"
                said = row.skipped or f"exact match {row.exact:.3f}"
                note(f"{row.name}{seed}: {said}, {time.monotonic() - started:.0f} s")
            yield row


def _kept(events: Path, head: Mapping[str, Any]) -> list[Row]:
    """The rows of an interrupted run, whose journal starts with ``head``; a line that was cut short is taken away."""
    whole, _, _ = events.read_text(encoding="utf-8").rpartition("\n") if events.is_file() else ("", "", "")
    lines = whole.splitlines() or [json.dumps(head)]
    if json.loads(lines[0]) != head:
        raise ComposeError(
            f"{events.parent} holds a comparison of other routers, records, adapters or settings; give another --out, "
            "or --force to start again"
        )
    part = events.with_name(events.name + ".part")
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    part.replace(events)
    return [row_from_json(json.loads(line)) for line in lines[1:]]


def _fingerprint(request: EvalRequest, inputs: EvalInputs) -> str:
    """SHA-256 over everything that rows depend on."""
    routers = [
        [router.name, router.seed, hashlib.sha256((router.folder / MIXTURE).read_bytes()).hexdigest()]
        for router in request.routers
    ]
    records = [mixed_hash(part) for part in (inputs.test, inputs.choosing, inputs.training)]
    bank = {} if inputs.bank is None else dict(inputs.bank.hashes)
    own = [request.merges, request.merge_rank, request.ablations, request.dtype, request.seeds]
    about = [compose.__version__, request.base, bank, routers, records, own, _one_lora(request, inputs)]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _router_run(router: RouterFolder, loaded: LoadedModel, bank: Bank | None) -> RouterRun:
    from compose.engine.routed import open_routed
    from compose.evaluation.compare import RouterRun

    def opened() -> RoutedModel:
        return open_routed(loaded.model, bank, router.folder)

    return RouterRun(router.name, router.seed, opened, router.trained)


def _baseline(request: EvalRequest, inputs: EvalInputs) -> Baseline | None:
    """How the one LoRA is trained: as the recipe says, or in one stage of ``--steps``."""
    from compose.evaluation.compare import Baseline
    from compose.routers.stages import Stage
    from compose.routers.train_settings import TrainSettings

    if not inputs.training:
        return None
    recipe = request.recipe
    settings = TrainSettings(batch_size=16)
    if recipe is not None:
        settings = TrainSettings(
            batch_size=recipe.batch_size, accumulation=recipe.accumulation, sampling=recipe.sampling,
            max_length=recipe.max_length, truncate=recipe.truncate,
        )  # fmt: skip
    stages = (Stage(name="train", epochs=1),) if recipe is None or not recipe.stages else recipe.stages
    if request.steps is not None:
        stages = (Stage(name="train", steps=request.steps),)
    return Baseline(
        records=inputs.training, stages=stages, settings=settings, seeds=request.seeds,
        learning_rate=request.learning_rate,
    )  # fmt: skip


def _one_lora(request: EvalRequest, inputs: EvalInputs) -> dict[str, Any] | None:
    """The same as plain values."""
    baseline = _baseline(request, inputs)
    if baseline is None:
        return None
    stages = [
        {
            "name": stage.name,
            "steps": stage.steps,
            "epochs": stage.epochs,
            "learning_rate": baseline.rate(stage),
            "schedule": stage.schedule,
        }
        for stage in baseline.stages
    ]
    return {"seeds": list(baseline.seeds), "stages": stages, "settings": baseline.settings.to_json()}


def _result(request: EvalRequest, inputs: EvalInputs, rows: Sequence[Row], command: Sequence[str]) -> dict[str, Any]:
    skipped = {f"{row.name}{'' if row.seed is None else f', seed {row.seed}'}": row.skipped for row in rows}
    return {
        "version": compose.__version__,
        "command": list(command),
        **_plan(request, inputs),
        "hashes": {} if inputs.bank is None else dict(inputs.bank.hashes),
        "contenders": [
            {**summary._asdict(), "tasks": {task: score._asdict() for task, score in task_means(rows, summary.name)}}
            for summary in summarise(rows)
        ],
        "skipped": {name: why for name, why in skipped.items() if why},
        "verdicts": verdicts(rows),
    }


def _pictures(request: EvalRequest, inputs: EvalInputs, loaded: LoadedModel, rows: Sequence[Row]) -> dict[str, bytes]:
    """Trace, page and picture of the first router over the records that are scored."""
    from compose.evaluation.measure import measure_routing
    from compose.report.routing_data import read_history
    from compose.report.routing_html import render_routing
    from compose.report.routing_png import routing_png

    first = request.routers[0]
    about = {"router": first.name, "folder": str(first.folder), "base": request.base, "records": len(inputs.test)}
    with _opened(first, loaded, inputs.bank) as routed:
        try:
            about = {"preset": routed.spec.preset or first.name, **about}
            trace = measure_routing(routed, loaded, inputs.test, about=about)
        except IncompatibleError as error:
            note(f"no report of {first.name}: {error}", "yellow")
            return {}
    history = first.folder / HISTORY
    course = read_history(history, trace.experts) if history.is_file() else None
    files = {
        TRACE: (json.dumps(trace.to_json(), allow_nan=False) + "\n").encode(),
        REPORT: render_routing(trace, course, page_scores(rows, first.name)).encode(),
    }
    try:
        files[PICTURE] = routing_png(trace, course)
    except BackendUnavailableError as error:
        note(str(error))
    return files


@contextmanager
def _opened(router: RouterFolder, loaded: LoadedModel, bank: Bank | None) -> Iterator[RoutedModel]:
    routed = _router_run(router, loaded, bank).open().eval()
    try:
        yield routed
    finally:
        routed.attached.detach()
