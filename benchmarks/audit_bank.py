"""Benign adapters of one kind for the audit study: the demo's 36 tasks, each trained several times, unlike each other.

Every wave has its own seed, initial values, learning rate and length of training, as adapters of different people
would. All have rank 4 on all linear layers of the demo's base, so that they are siblings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from compose.adapter import Adapter
    from compose.demo.bank_training import StackedAdapters

RANK, ALPHA = 4, 8.0
ROWS, KEPT = 1200, 400
"""Training rows drawn per adapter, and how many of them, the shortest, are kept: a CPU has to do it in minutes."""


class Wave(NamedTuple):
    """How one adapter per task is trained."""

    learning_rate: float
    steps: int
    weight_decay: float


WAVES = (Wave(3e-3, 60, 0.1), Wave(6e-3, 40, 0.0), Wave(2e-3, 80, 0.1))


def benign_bank(seed: int, tasks: int, steps: float, batch: int) -> tuple[dict[str, list[Adapter]], dict[str, float]]:
    """Train ``tasks * len(WAVES)`` adapters; return task -> its adapters, and exact match per adapter on its own task.

    Args:
        seed: Of data, initial values and order of batches.
        tasks: How many of the demo's tasks, in their order.
        steps: Factor of every wave's steps.
        batch: Rows per adapter and step.
    """
    import torch

    from compose.demo.bank_data import adapter_rows
    from compose.demo.bank_training import AdapterSpec, BankTraining, StackedAdapters, train_bank
    from compose.demo.build import own_scores
    from compose.demo.network import TARGETS, Shape
    from compose.demo.pretraining import to_ids
    from compose.demo.wordings import TRAINING_WORDINGS

    names = list(TRAINING_WORDINGS)[:tasks]
    shape, base, device = Shape(), base_parameters(), torch.device("cpu")
    found: dict[str, list[Adapter]] = {name: [] for name in names}
    scores: dict[str, float] = {}
    for number, wave in enumerate(WAVES):
        mark = 1000 * seed + number
        rows = to_ids(np.stack([_short_rows(adapter_rows(name, mark, ROWS)) for name in names]), device)
        specs = [AdapterSpec(name=name, rank=RANK, targets=TARGETS, alpha=ALPHA) for name in names]
        stacked = StackedAdapters(shape, specs, mark, False, device)
        options = BankTraining(
            steps=max(1, round(wave.steps * steps)),
            batch=batch,
            learning_rate=wave.learning_rate,
            weight_decay=wave.weight_decay,
            shared_a=False,
        )
        train_bank(shape, base, stacked, rows, options, mark)
        own = own_scores(shape, base, stacked, device, items=10)
        for at, name in enumerate(names):
            found[name].append(_adapter(stacked, at, f"{name}-{number}", shape.layers))
            scores[f"{name}-{number}"] = own[name]
    return found, scores


def kept_bank(
    folder: Path, seed: int, tasks: int, steps: float, batch: int
) -> tuple[dict[str, list[Adapter]], dict[str, float]]:
    """Return `benign_bank`, trained once and kept in ``folder`` as PEFT folders."""
    from compose.bank import Bank
    from compose.formats.peft import write_adapter

    settings = {"seed": seed, "tasks": tasks, "steps": steps, "batch": batch}
    about = folder / "bank.json"
    if not about.exists():
        found, scores = benign_bank(seed, tasks, steps, batch)
        for adapters in found.values():
            for one in adapters:
                write_adapter(one, folder / one.name, overwrite=True)
        about.write_text(json.dumps({"settings": settings, "exact": scores}))
    kept = json.loads(about.read_text())
    if kept["settings"] != settings:
        raise SystemExit(f"{folder} holds a bank of {kept['settings']}, not of {settings}; give another --out")
    bank, by_task = Bank.open(folder), dict[str, list["Adapter"]]()
    for name in kept["exact"]:
        by_task.setdefault(name.rpartition("-")[0], []).append(bank[name])
    return by_task, kept["exact"]


def base_parameters() -> dict[str, Tensor]:
    """Return the demo base's parameters in float32 under the names that `compose.demo.network` uses."""
    from safetensors.torch import load_file

    from compose.demo.assets import demo_base

    return {name: value.float() for name, value in load_file(Path(demo_base()) / "model.safetensors").items()}


def _short_rows(rows: np.ndarray) -> np.ndarray:
    """Return the `KEPT` shortest of padded rows ``(N, T)``, in their order."""
    from compose.demo.pretraining_data import PAD_BYTE

    lengths = (rows != PAD_BYTE).sum(axis=1)
    return rows[np.sort(np.argsort(lengths, kind="stable")[:KEPT])]


def _adapter(stacked: StackedAdapters, at: int, name: str, layers: int) -> Adapter:
    from compose.adapter import Adapter, LowRank
    from compose.demo.network import TARGETS

    targets = {
        f"model.layers.{layer}.{target}": LowRank(
            stacked.a[target][layer, at].clone(), stacked.b[target][layer, at].clone(), stacked.specs[at].scaling
        )
        for target in TARGETS
        for layer in range(layers)
    }
    return Adapter(name, "compose-demo-base", targets)
