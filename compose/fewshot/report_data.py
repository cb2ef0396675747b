"""The content of report.json (schema version 1), from the parts of a finished run."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import compose
from compose.bank import Bank
from compose.engine.composed import ComposedAdapter
from compose.fewshot.controls import Control, Measured
from compose.fewshot.loading import LoadedModel
from compose.fewshot.preselect import Preselection
from compose.fewshot.procedure import SearchOutcome
from compose.fewshot.scoring import Interval, Scores, interval
from compose.fewshot.settings import SearchSettings
from compose.text.examples import examples_hash

SCHEMA_VERSION = 1
_SHOWN_TEST_ITEMS = 12


@dataclass(frozen=True)
class FinishedRun:
    """Everything a report tells of.

    Attributes:
        loaded: The base model.
        bank: All adapters offered.
        candidates: The adapters that entered the search.
        measured: Shots and test items.
        settings: As given.
        outcome: The search's result.
        controls: The comparison, ``composed`` first.
        chosen: The preselection.
        singles: ``(N,)`` mean loss of every candidate alone on the shots.
        composed: The new adapter, ``None`` when the base was chosen.
        warnings: What the user should know.
        output_bytes: Size of the adapter's files.
        command: The command line, if any.
    """

    loaded: LoadedModel
    bank: Bank
    candidates: Bank
    measured: Measured
    settings: SearchSettings
    outcome: SearchOutcome
    controls: Sequence[Control]
    chosen: Preselection
    singles: np.ndarray
    composed: ComposedAdapter | None
    warnings: Sequence[str]
    output_bytes: int
    command: Sequence[str] | None


def build_report(run: FinishedRun) -> dict[str, Any]:
    """Return the report as plain JSON-able data."""
    bank, candidates, measured, controls = run.bank, run.candidates, run.measured, run.controls
    alone = {**run.chosen.alone, **dict(zip(candidates.names, map(float, run.singles), strict=True))}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "few-shot search",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "compose": compose.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "command": None if run.command is None else list(run.command),
        "base": {"id": bank.base or getattr(run.loaded.model.config, "_name_or_path", "")},
        "bank": {"size": len(bank), "adapters": [_adapter_row(bank, name, candidates, alone) for name in bank.names]},
        "data": {
            "examples": len(measured.examples),
            "examples_sha256": examples_hash(measured.examples),
            "test": len(measured.test) or None,
        },
        "settings": asdict(run.settings),
        "search": _search_section(run.settings, run.outcome, run.chosen),
        "weights": _weights_section(candidates, run.outcome),
        "examples": _shots_section(measured, controls),
        "controls": [_control_row(control, controls[0], run.settings) for control in controls],
        "test_examples": _test_section(measured, controls),
        "output": _output_section(run.settings, run.composed, run.output_bytes),
        "warnings": [*run.warnings, *_search_warnings(run.outcome)],
    }


def _adapter_row(bank: Bank, name: str, candidates: Bank, alone: dict[str, float]) -> dict[str, Any]:
    ranks = bank[name].ranks.values()
    return {
        "name": name,
        "sha256": candidates.hashes.get(name, "") if name in candidates else "",
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "candidate": name in candidates,
        "alone": alone.get(name),
    }


def _search_section(settings: SearchSettings, outcome: SearchOutcome, chosen: Preselection) -> dict[str, Any]:
    result = outcome.result
    return {
        "strategy": settings.strategy,
        "ran": result.strategy,
        "evaluations": result.evaluations,
        "cost": result.cost,
        "preselection_cost": chosen.cost,
        "seconds": outcome.seconds,
        "history": [[cost, value, value] for cost, value in result.history],
        "stages": [
            {"name": stage.name, "value": stage.value, "cross_validated": stage.validated, "cost": stage.cost}
            for stage in result.stages
        ],
        "guard": [row._asdict() for row in result.guard],
        "choice": result.choice,
        "reason": result.why,
    }


def _weights_section(candidates: Bank, outcome: SearchOutcome) -> dict[str, Any]:
    coefficients = outcome.coefficients
    if coefficients is None:
        values, labels = np.zeros((1, len(candidates))), ["all"]
    elif coefficients.groups is None:
        values, labels = coefficients.values[None].double().numpy(), ["all"]
    else:
        values = coefficients.values.double().numpy()
        labels = [f"layer {group}" for group in range(len(values))]
    return {"adapters": list(candidates.names), "groups": labels, "values": values.tolist()}


def _shots_section(measured: Measured, controls: Sequence[Control]) -> list[dict[str, Any]]:
    composed, base = controls[0], _named(controls, "base")
    return [
        {
            "input": example.input,
            "output": example.output,
            "loss_base": _loss(base, index),
            "loss_composed": _loss(composed, index),
            "text_base": None,
            "text_composed": None,
        }
        for index, example in enumerate(measured.examples)
    ]


def _test_section(measured: Measured, controls: Sequence[Control]) -> list[dict[str, Any]]:
    composed, base = controls[0].scores, _named(controls, "base")
    if composed is None:
        return []
    base_texts = base.scores.texts if base is not None and base.scores is not None else None
    return [
        {
            "input": item.input,
            "output": item.output,
            "text_base": None if base_texts is None else base_texts[index],
            "text_composed": composed.texts[index],
        }
        for index, item in enumerate(measured.test[:_SHOWN_TEST_ITEMS])
    ]


def _control_row(control: Control, composed: Control, settings: SearchSettings) -> dict[str, Any]:
    return {
        "name": control.name,
        "label": control.label,
        "note": control.note,
        "shots_loss": None if control.shots_losses is None else float(control.shots_losses.mean()),
        "cost": control.cost,
        "test": None if control.scores is None else _test_scores(control, control.scores, composed, settings),
    }


def _test_scores(control: Control, scores: Scores, composed: Control, settings: SearchSettings) -> dict[str, Any]:
    def measure(values: np.ndarray | None) -> dict[str, float] | None:
        return None if values is None else _plain(interval(values, samples=settings.bootstrap, seed=settings.seed))

    difference = None
    if control is not composed and composed.scores is not None:
        difference = scores.exact.astype(float) - composed.scores.exact
    return {
        "n": len(scores.exact),
        "exact_match": measure(scores.exact),
        "loss": measure(scores.losses),
        "options": measure(scores.options),
        "minus_composed": measure(difference),
    }


def _output_section(settings: SearchSettings, composed: ComposedAdapter | None, size: int) -> dict[str, Any] | None:
    if composed is None:
        return None
    ranks = composed.adapter.ranks.values()
    lost = None if settings.rank is None else {"rank": settings.rank, "relative_error": composed.relative_error}
    return {
        "combine": settings.combine,
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "targets": len(composed.adapter.targets),
        "parameters": composed.adapter.num_parameters,
        "bytes": size,
        "recompressed": lost,
    }


def _search_warnings(outcome: SearchOutcome) -> list[str]:
    invalid = outcome.result.invalid
    return [f"{invalid} candidates had losses that are not finite; they were penalised"] if invalid else []


def _named(controls: Sequence[Control], name: str) -> Control | None:
    return next((control for control in controls if control.name == name), None)


def _loss(control: Control | None, index: int) -> float | None:
    return None if control is None or control.shots_losses is None else float(control.shots_losses[index])


def _plain(values: Interval) -> dict[str, float]:
    return values._asdict()
