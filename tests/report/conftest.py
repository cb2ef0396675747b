"""A realistic report by hand: five shots, seven controls, a bank of 24."""

import math
import random
from typing import Any

import pytest

CONTROLS = [
    ("composed", "Composed (this search)", "", 0.21, (0.86, 0.81, 0.91), (0.31, 0.22, 0.41), 96.0),
    ("base", "Base model", "no adapter", 3.42, (0.0, 0.0, 0.0), (3.5, 3.3, 3.7), 1.0),
    ("constant", "Constant label", "the most frequent output of the shots", None, (0.04, 0.02, 0.08), None, 0.0),
    ("uniform", "Uniform", "every candidate at 1/20", 2.2, (0.06, 0.03, 0.1), (2.3, 2.1, 2.5), 1.0),
    (
        "best_single",
        "Best single",
        "reverse-words, by its loss on the shots",
        0.34,
        (0.82, 0.77, 0.88),
        (0.4, 0.3, 0.52),
        24.0,
    ),
    (
        "random_bank",
        "Random bank",
        "same search over random adapters of the same norms",
        2.9,
        (0.01, 0.0, 0.03),
        (3.4, 3.2, 3.6),
        96.0,
    ),
    (
        "trained_lora",
        "LoRA on the shots",
        "rank 8, trained on the same shots at equal cost",
        0.05,
        (0.11, 0.07, 0.15),
        (2.1, 1.8, 2.4),
        96.0,
    ),
]


def _interval(triple):
    return None if triple is None else dict(zip(("mean", "low", "high"), triple, strict=True))


def search_section(groups: int, history: int, course: list[list[float]]) -> dict[str, Any]:
    """Return the part about the search itself."""
    return {"strategy": "auto", "ran": "auto: singles, pair, gradient", "evaluations": history,
                   "cost": 171.6, "seconds": 12.4, "history": course,
                   "stages": [{"name": "singles", "value": 0.34, "cross_validated": 0.36, "cost": 24.0},
                              {"name": "gradient", "value": 0.22, "cross_validated": 0.29, "cost": 60.0},
                              {"name": "layer-wise gradient", "value": 0.21, "cross_validated": None, "cost": 87.0}],
                   "guard": [
                       {"kind": "base", "value": 3.4, "validated": 3.4, "against": None, "gain": None,
                        "standard_error": None, "margin": None, "accepted": True},
                       {"kind": "single", "value": 0.34, "validated": 0.36, "against": "base", "gain": 3.04,
                        "standard_error": 0.21, "margin": 0.0, "accepted": True},
                       {"kind": "scalar", "value": 0.22, "validated": 0.29, "against": "single", "gain": 0.07,
                        "standard_error": 0.03, "margin": 0.03, "accepted": groups == 1}],
                   "choice": "scalar" if groups == 1 else "layerwise",
                   "reason": "Cross-validated loss 0.29 against 0.36 for reverse-words."}  # fmt: skip


def make_report(groups: int = 1, shots: int = 5, bank: int = 24, history: int = 90) -> dict[str, Any]:
    """Return a report of the schema with deterministic made-up numbers."""
    draw = random.Random(3)
    names = [
        f"{verb}-{thing}"
        for verb in ("reverse", "sort", "upper", "count", "join", "drop")
        for thing in ("words", "letters", "numbers", "dates")
    ] + [f"extra-{i}" for i in range(max(0, bank - 24))]
    names = names[:bank]
    candidates = names[:20]
    values = [[round(draw.gauss(0, 0.4), 3) if i < 5 else 0.0 for i in range(len(candidates))] for _ in range(groups)]
    values[0][0] = 0.93
    course, best = [], math.inf
    for i in range(history):
        value = 0.2 + 3.2 * math.exp(-i / 14) + abs(draw.gauss(0, 0.25))
        best = min(best, value)
        course.append([1.0 + i * 1.9, value, best])
    texts = [(f"Write the words in the opposite order: w{i} oak {i} rain", f"rain {i} oak w{i}") for i in range(shots)]
    return {
        "schema_version": 1, "kind": "few-shot search", "created": "2026-11-23T19:20:00+00:00",
        "versions": {"compose": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "command": ["compose", "search", "--demo", "new-wording-reverse", "--out", "runs/reverse"],
        "base": {"id": "compose-demo-base"},
        "bank": {"size": bank, "adapters": [
            {"name": name, "sha256": f"{draw.getrandbits(256):064x}", "rank_min": 4, "rank_max": 8 + 4 * (i % 2),
             "candidate": name in candidates, "alone": round(0.34 + 0.15 * i, 3) if i < 22 else None}
            for i, name in enumerate(names)]},
        "data": {"examples": shots, "examples_sha256": "ab" * 32, "test": 200},
        "settings": {"strategy": "auto", "combine": "outputs", "layers": None, "budget": None, "candidates": 20,
                     "preselect": "loss", "l1": 0.05, "smoothness": 0.0, "seed": 0, "rank": None, "controls": "auto",
                     "max_rows": None, "bootstrap": 1000},
        "search": search_section(groups, history, course),
        "weights": {"adapters": candidates, "values": values,
                    "groups": ["all"] if groups == 1 else [f"layer {i}" for i in range(groups)]},
        "examples": [{"input": given, "output": wanted, "loss_base": 2.4 + 0.5 * i, "text_base": given[-14:],
                      "loss_composed": 0.12 + 0.06 * i if i != 3 else 4.4,
                      "text_composed": wanted if i != 3 else "rain"}
                     for i, (given, wanted) in enumerate(texts)],
        "controls": [{"name": name, "label": label, "note": note, "shots_loss": loss, "cost": cost,
                      "test": {"n": 200, "exact_match": _interval(match), "loss": _interval(test_loss),
                               "options": None,
                               "minus_composed": None if name == "composed" else
                               {"mean": match[0] - 0.86, "low": match[0] - 0.91, "high": match[0] - 0.805}}}
                     for name, label, note, loss, match, test_loss, cost in CONTROLS],
        "test_examples": [{"input": f"Reverse these: pine {i} fog", "output": f"fog {i} pine",
                           "text_base": f"pine {i}", "text_composed": f"fog {i} pine" if i % 4 else "fog pine"}
                          for i in range(12)],
        "output": {"combine": "outputs", "rank_min": 88, "rank_max": 160, "targets": 42, "parameters": 3_440_640,
                   "bytes": 13_767_000, "recompressed": None},
        "warnings": ["5 shots identify little: gains on other inputs are uncertain."],
    }  # fmt: skip


@pytest.fixture(name="make_report")
def _make_report():
    return make_report


@pytest.fixture
def report() -> dict[str, Any]:
    return make_report()
