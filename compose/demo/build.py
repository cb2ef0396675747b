"""Makes the shipped files: pretrains the base, trains the bank, scores every adapter on its own task.

Run ``python -m compose.demo.build --out FOLDER --device cuda``; about five minutes on one H200 and 16 cores.
"""

import argparse
import logging
import os
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compose.demo.bank_data import adapter_rows
from compose.demo.bank_training import BankTraining, StackedAdapters, train_bank
from compose.demo.export import export_adapters, export_base
from compose.demo.network import Shape, hidden_states, response_loss
from compose.demo.pretraining import Pretraining, pretrain, to_ids
from compose.demo.pretraining_data import Rows, encode, pretraining_rows
from compose.demo.specs import BANK
from compose.demo.tasks import TASKS, test_items

logger = logging.getLogger(__name__)

SHARD_ROWS = 50_000


def build(
    out: Path,
    seed: int,
    device: torch.device,
    *,
    shards: int = 120,
    rows_per_adapter: int = 12_000,
    pretraining: Pretraining | None = None,
    bank_training: BankTraining | None = None,
) -> dict[str, float]:
    """Make ``out/base`` and ``out/bank`` and return each adapter's exact match on its own test items.

    Args:
        out: Folder to write to.
        seed: Seed of the data, the initial values and the order of batches.
        device: Where to train.
        shards: Number of shards of 50,000 pretraining rows.
        rows_per_adapter: Training rows of each adapter.
        pretraining: Hyperparameters of the base.
        bank_training: Hyperparameters of the adapters.
    """
    started = time.monotonic()
    rows, bank_rows = _generate(seed, shards, rows_per_adapter)
    logger.info("data ready after %.0f s, device %s, seed %d", time.monotonic() - started, device, seed)
    shape = Shape()
    base = pretrain(shape, rows, pretraining or Pretraining(), seed, device)
    base = {name: value.half().float() for name, value in base.items()}
    export_base(shape, base, out / "base")
    options = bank_training or BankTraining()
    adapters = StackedAdapters(shape, BANK, seed, options.shared_a, device)
    stopped = train_bank(shape, base, adapters, to_ids(bank_rows, device), options, seed)
    export_adapters(adapters, out / "bank")
    scores = own_scores(shape, base, adapters, device)
    for name, step in zip(scores, stopped.tolist(), strict=True):
        logger.info("adapter %s: exact match %.3f on its own task, stopped at step %d", name, scores[name], step)
    logger.info("done after %.0f s", time.monotonic() - started)
    return scores


@torch.no_grad()
def own_scores(
    shape: Shape, base: dict[str, Tensor], adapters: StackedAdapters, device: torch.device, items: int = 200
) -> dict[str, float]:
    """Exact match of each adapter on its own test items (the greedy answer, end token included)."""
    encoded = [[encode(*item) for item in test_items(TASKS[spec.name], items)] for spec in adapters.specs]
    ids = to_ids(np.stack([[np.frombuffer(row or b"", np.uint8) for row in rows] for rows in encoded]), device)
    embedding = base["model.embed_tokens.weight"]
    hidden = hidden_states(shape, base, functional.embedding(ids, embedding), adapters.delta)
    correct = response_loss(hidden, embedding, ids)[1].all(-1).float().mean(1)
    return dict(zip([spec.name for spec in adapters.specs], correct.tolist(), strict=True))


def _generate(seed: int, shards: int, rows_per_adapter: int) -> tuple[Rows, np.ndarray]:
    """All data, in worker processes that end before an accelerator is first used."""
    with Pool(os.cpu_count()) as pool:
        parts = pool.starmap(pretraining_rows, [(seed + index, SHARD_ROWS) for index in range(shards)], chunksize=1)
        bank = pool.starmap(adapter_rows, [(spec.name, seed, rows_per_adapter) for spec in BANK], chunksize=1)
    rows = Rows(np.concatenate([part.tokens for part in parts]), np.concatenate([part.codes for part in parts]))
    return rows, np.stack(bank)


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_float32_matmul_precision("high")
    build(arguments.out, arguments.seed, torch.device(arguments.device))


if __name__ == "__main__":
    main()
