"""Run one search to its end in children that are killed -9 at random moments, and print every result as JSON.

Usage: killed_search.py FOLDER STRATEGY KILLS SEED PAUSE. Forks, so that the libraries are imported once.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np

from compose.search.evaluator import Budget
from compose.search.journal import JournalFile
from compose.search.objective import Evaluation
from compose.search.procedure import search
from compose.search.space import Space


class Slow:
    """A quadratic with irrational numbers everywhere, a NaN now and then, and a pause in which it can be killed."""

    differentiable = True
    example_weights = np.array([1.0, 2.0, 3.0, 1.0, 1.0])

    def __init__(self, pause):
        generator = np.random.default_rng(5)
        self.pause = pause
        self.maps = generator.standard_normal((5, 3, 12))
        self.targets = generator.standard_normal((5, 12)) / 3

    def __call__(self, weights, *, gradient=False, example_weights=None):
        time.sleep(self.pause)
        residuals = np.einsum("skd,psd->psk", self.maps, weights[:, None] - self.targets)
        losses = np.square(residuals).sum(axis=2) / 7
        losses[weights[:, 0] > 1.2] = np.nan
        gradients = None
        if gradient:
            gradients = np.einsum("ps,psk,skd->pd", example_weights, residuals, self.maps) * 2 / 7
        return Evaluation(losses, gradients, len(weights) * (2.3 if gradient else 1.0))


def run(strategy, path, pause, resume):
    result = search(
        Slow(pause),
        Space(num_adapters=6, num_groups=2, l1=0.01, smoothness=0.02),
        strategy=strategy,
        budget=Budget(cost=420, evaluations=100 if strategy == "cobyla" else None),
        seed=3,
        journal=JournalFile(path=path, fingerprint={"objective": "slow"}, resume=resume),
    )
    values = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "replayed"}
    return json.dumps(values, default=lambda value: value.tolist())  # repr of floats: exact


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def kill_once(strategy, path, pause, generator):
    """Let a child continue the search, kill it a random moment after it has recorded something; return the size."""
    before = size_of(path)
    child = os.fork()
    if child == 0:
        run(strategy, path, pause, resume=True)
        os._exit(0)
    deadline = time.monotonic() + 30
    while size_of(path) <= before and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(generator.uniform(0, 2 * pause))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return size_of(path) if os.WIFSIGNALED(status) else -1


def main():
    folder, strategy, kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    pause = float(sys.argv[5])
    whole = run(strategy, folder / "whole.jsonl", 0.0, resume=False)
    generator = random.Random(seed)
    path = folder / "killed.jsonl"
    sizes = [kill_once(strategy, path, pause, generator) for _ in range(kills)]
    resumed = run(strategy, path, 0.0, resume=True)
    report = {"whole": whole, "resumed": resumed, "sizes": sizes, "end": size_of(path)}
    sys.stdout.write(json.dumps(report))


main()
