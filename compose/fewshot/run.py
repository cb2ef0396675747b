"""few_shot_search: a few examples of a task in; weights over a bank, a new adapter and a report out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.attach import AttachedModel, attach
from compose.engine.coefficients import Coefficients
from compose.engine.composed import ComposedAdapter, composed_adapter
from compose.errors import ExamplesError
from compose.fewshot.card import card
from compose.fewshot.controls import (
    Control,
    Measured,
    bank_controls,
    random_bank_control,
    trained_lora_control,
    wanted_controls,
)
from compose.fewshot.loading import LoadedModel
from compose.fewshot.preselect import (
    Preselection,
    Ranker,
    preselect_at_random,
    preselect_by_loss,
    preselect_by_ranker,
    single_losses,
)
from compose.fewshot.procedure import SearchOutcome, run_search, search_budget, search_groups
from compose.fewshot.report_data import FinishedRun, build_report
from compose.fewshot.run_folder import RunFolder
from compose.fewshot.settings import SearchSettings
from compose.formats.peft import adapter_files
from compose.search.evaluator import Progress
from compose.search.journal import JournalFile
from compose.text.encoding import encode
from compose.text.examples import Example, examples_hash

ADAPTER_NAME = "composed"


class ProgressEvent(NamedTuple):
    """What a progress callback is told: the stage, what it cost so far, the budget, and the best loss yet."""

    stage: str
    cost: float
    budget: float | None
    best: float | None


ProgressCallback = Callable[[ProgressEvent], None]


@dataclass(frozen=True)
class SearchRun:
    """The result of `few_shot_search`.

    Attributes:
        report: The content of ``report.json``.
        adapter: The new adapter, ``None`` when the base model was chosen.
        coefficients: Over the candidates in ``report["weights"]["adapters"]``; ``None`` for the base model.
        folder: The published run folder, if one was asked for.
    """

    report: dict[str, Any]
    adapter: Adapter | None
    coefficients: Coefficients | None
    folder: Path | None


def few_shot_search(  # noqa: PLR0913 - the one entry point: every option is a keyword
    loaded: LoadedModel,
    bank: Bank,
    examples: Sequence[Example],
    *,
    settings: SearchSettings | None = None,
    test: Sequence[Example] = (),
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    ranker: Ranker | None = None,
    render: Callable[[dict[str, Any]], str] | None = None,
    progress: ProgressCallback | None = None,
    command: Sequence[str] | None = None,
) -> SearchRun:
    """Search weights over a bank of adapters for a task given by a few examples.

    Preselection, search and guard see the examples only; test items are scored once, at the end, and nothing is ever
    chosen by them. When nothing beats the base model the result says so and holds no adapter.

    Args:
        loaded: The frozen base model with tokenizer and prompt format (`compose.fewshot.loading.load_model`).
        bank: The adapters.
        examples: The shots, a handful to a few dozen.
        settings: Strategy, budget, candidates, seed ...; default `SearchSettings()`.
        test: Held-out items for the comparison with the controls.
        out: Folder of the result; while the search runs the journal lies in ``out.partial``.
        resume: Continue ``out.partial`` after an interruption; the end is the same to the bit.
        force: Replace an existing ``out``.
        ranker: Orders adapters by the examples, for ``preselect="embedding"``.
        render: Makes ``report.html`` of the report (`compose.report.html.render`).
        progress: Called with a `ProgressEvent` after every step.
        command: The command line, for the record.

    Raises:
        ComposeError: Bad settings, examples, bank or folder; nothing is written then.
    """
    settings = settings or SearchSettings()
    folder = None if out is None else RunFolder(out, resume=resume, force=force)
    tell = progress or (lambda event: None)
    measured = _encode(loaded, examples, test)
    chosen = _preselect(loaded, bank, measured, settings, ranker, tell)
    candidates = bank.select(chosen.names)
    if folder is not None:
        folder.begin()
    with attach(loaded.model, candidates) as attached:
        groups = search_groups(attached, settings)
        outcome = run_search(
            attached,
            measured.shots,
            settings,
            groups=groups,
            journal=None if folder is None else _journal(folder, attached, measured, settings, resume),
            progress=_search_progress(tell),
        )
        wanted, warnings = wanted_controls(settings, measured, outcome.result.cost)
        tell(ProgressEvent("controls", outcome.result.cost, None, outcome.result.value))
        singles = single_losses(attached, measured.shots, range(len(candidates))).mean(axis=1)
        controls = bank_controls(measured, attached, outcome, singles, wanted)
    controls += _expensive_controls(measured, candidates, settings, outcome, groups, wanted, tell)
    composed = _compose(candidates, outcome, settings)
    files = {} if composed is None else adapter_files(composed.adapter)
    report = build_report(
        FinishedRun(
            loaded,
            bank,
            candidates,
            measured,
            settings,
            outcome,
            controls,
            chosen,
            singles,
            composed,
            warnings,
            sum(map(len, files.values())),
            command,
        )
    )
    path = None if folder is None else _publish(folder, files, report, render)
    return SearchRun(report, None if composed is None else composed.adapter, outcome.coefficients, path)


def _encode(loaded: LoadedModel, examples: Sequence[Example], test: Sequence[Example]) -> Measured:
    if not examples:
        raise ExamplesError("no examples given; a handful of inputs with their outputs is needed")
    encoder_decoder = loaded.model.config.is_encoder_decoder
    shots = encode(examples, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    return Measured(loaded, list(examples), shots, list(test))


def _preselect(
    loaded: LoadedModel,
    bank: Bank,
    measured: Measured,
    settings: SearchSettings,
    ranker: Ranker | None,
    tell: ProgressCallback,
) -> Preselection:
    keep = settings.candidates
    if len(bank) <= keep:
        return Preselection(bank.names, {}, 0.0)
    tell(ProgressEvent("preselection", 0.0, None, None))
    if settings.preselect == "random":
        return preselect_at_random(bank.names, keep, settings.seed)
    if settings.preselect == "embedding":
        return preselect_by_ranker(bank.names, keep, ranker, measured.examples)
    with attach(loaded.model, bank) as attached:
        return preselect_by_loss(attached, measured.shots, keep)


def _journal(
    folder: RunFolder, attached: AttachedModel, measured: Measured, settings: SearchSettings, resume: bool
) -> JournalFile:
    fingerprint = {
        "base": getattr(attached.model.config, "_name_or_path", ""),
        "base_parameters": sum(parameter.numel() for parameter in attached.model.parameters()),
        "adapters": dict(attached.bank.hashes),
        "examples": examples_hash(measured.examples),
        "combine": settings.combine,
        "layers": settings.layers,
    }
    return JournalFile(path=folder.events, fingerprint=fingerprint, resume=resume)


def _search_progress(tell: ProgressCallback) -> Callable[[Progress], None]:
    def forward(report: Progress) -> None:
        limit = report.budget.cost or report.budget.evaluations
        tell(ProgressEvent(report.stage, report.cost, limit, report.best_value))

    return forward


def _expensive_controls(
    measured: Measured,
    candidates: Bank,
    settings: SearchSettings,
    outcome: SearchOutcome,
    groups: dict[str, int] | None,
    wanted: Sequence[str],
    tell: ProgressCallback,
) -> list[Control]:
    controls = []
    if "random_bank" in wanted:
        tell(ProgressEvent("control: random bank", 0.0, None, None))
        controls.append(random_bank_control(measured, candidates, settings, outcome, groups))
    if "trained_lora" in wanted:
        tell(ProgressEvent("control: LoRA on the shots", 0.0, None, None))
        controls.append(trained_lora_control(measured, candidates, settings, outcome.result.cost))
    return controls


def _compose(candidates: Bank, outcome: SearchOutcome, settings: SearchSettings) -> ComposedAdapter | None:
    if outcome.coefficients is None:
        return None
    return composed_adapter(candidates, outcome.coefficients, name=ADAPTER_NAME, rank=settings.rank)


def _publish(
    folder: RunFolder,
    files: dict[str, bytes],
    report: dict[str, Any],
    render: Callable[[dict[str, Any]], str] | None,
) -> Path:
    texts = {"report.json": json.dumps(report, indent=1, allow_nan=False), "README.md": card(report)}
    if render is not None:
        texts["report.html"] = render(report)
    return folder.publish({**files, **{name: text.encode() for name, text in texts.items()}})


def plan_search(
    loaded: LoadedModel,
    bank: Bank,
    examples: Sequence[Example],
    *,
    settings: SearchSettings | None = None,
) -> dict[str, Any]:
    """Return what a search would do, without searching: adapters, sizes, evaluations, and minutes from two probes.

    The probes are the base model's loss on the shots, twice; the second is timed.
    """
    settings = settings or SearchSettings()
    measured = _encode(loaded, examples, ())
    keep = min(settings.candidates, len(bank))
    with attach(loaded.model, bank.select(bank.names[:keep])) as attached:
        groups = search_groups(attached, settings)
        attached.set(None)
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            measured.control("base", "base model", "", 1.0)
            seconds.append(time.perf_counter() - started)
    budget = search_budget(settings)
    limit = budget.cost or budget.evaluations or 0.0
    factors = sum(bank[name].num_parameters for name in bank.names[:keep])
    width = max(shot.length for shot in measured.shots)
    return {
        "adapters": [
            {"name": name, "sha256": digest, "ranks": sorted(set(bank[name].ranks.values()))}
            for name, digest in bank.hashes.items()
        ],
        "candidates": keep,
        "groups": 1 if groups is None else max(groups.values()) + 1,
        "coefficients": keep * (1 if groups is None else max(groups.values()) + 1),
        "examples": len(examples),
        "longest_example_tokens": width,
        "budget_forward_equivalents": limit,
        "minutes_at_most": round(limit * seconds[-1] / 60, 2),
        "memory_bytes": int(sum(p.numel() * p.element_size() for p in loaded.model.parameters()) + 4 * factors),
        "output_parameters_at_most": int(factors),
    }
