"""One generation of a few-shot search: 16 candidates x 5 examples over 20 adapters, seconds per candidate."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import demo
import lorahub_baseline
import models
import numpy as np
import torch
from registry import Check, Measured, Point, Settings, case
from timing import interleaved

import compose
from compose.bank import Bank
from compose.engine.coefficients import Combine
from compose.fewshot.population import PopulationObjective
from compose.text.encoding import Encoded

BASELINE = (
    "the same function one by one through PEFT. parameters: LoRAHub's procedure (sum state dicts, write them into the "
    "model, forward); outputs: likewise with the concatenated adapter, its columns scaled"
)


BASELINES: dict[Combine, type[lorahub_baseline.LoraHub]] = {
    "parameters": lorahub_baseline.LoraHub,
    "outputs": lorahub_baseline.Concatenation,
}


@dataclass(frozen=True)
class Shots:
    """One point's model and lengths of its five examples (prompt and response tokens)."""

    model: str
    rank: int
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    target: float
    dtype: torch.dtype = torch.float32
    adapters: int = 20
    candidates: int = 16


T5_35M = Shots("t5-35m", 16, (121, 96, 108, 117, 101), (4, 2, 3, 5, 3), 1.2)
LLAMA_TINY = Shots("llama-tiny", 2, (6, 9), (2, 3), 1.0, adapters=3, candidates=2)
T5_TINY = Shots("t5-tiny", 2, (6, 9), (2, 3), 1.0, adapters=3, candidates=2)
T5_LARGE = Shots("t5-large", 16, (121, 96, 108, 117, 101), (4, 2, 3, 5, 3), 10.0)
T5_LARGE_BF16 = Shots("t5-large", 16, (121, 96, 108, 117, 101), (4, 2, 3, 5, 3), 10.0, dtype=torch.bfloat16)


@case(
    "search_generation",
    description="16 candidates x 5 examples over 20 adapters, time per candidate: the demo model and a 35M T5",
    baseline=BASELINE,
    targets=">= 2.5x on the demo model, >= 1.2x on the T5",
)
def search_generation(settings: Settings) -> Iterator[Point]:
    """Yield both models, each with factors summed (LoRAHub's function) and with outputs summed."""
    if not settings.quick:
        yield from _demo_points(settings)
    for shots in (LLAMA_TINY, T5_TINY) if settings.quick else (T5_35M,):
        yield from _points(shots, settings)


@case(
    "search_generation_gpu",
    description="16 candidates x 5 examples of ~120 tokens over 20 rank-16 adapters on q, v of FLAN-T5-large shapes",
    baseline=BASELINE,
    targets=">= 10x",
    devices=("cuda",),
)
def search_generation_gpu(settings: Settings) -> Iterator[Point]:
    """Yield the large shapes in float32 and bfloat16; with ``quick`` the tiny ones."""
    for shots in (T5_TINY,) if settings.quick else (T5_LARGE, T5_LARGE_BF16):
        yield from _points(shots, settings)


def _points(shots: Shots, settings: Settings) -> Iterator[Point]:
    for combine in ("parameters", "outputs"):
        built = _build(shots, combine, settings)
        yield _point(shots, built, combine, settings)
        del built
        gc.collect()


def _demo_points(settings: Settings) -> Iterator[Point]:
    """The shipped base, twenty of its adapters and five shots of a composition.

    Factors are summed over the adapters as LoRAHub needs them (one rank, zeros where one misses a target); outputs
    over the adapters as they are, on both sides.
    """
    shots = Shots("the demo", demo.MAX_RANK, (), (), 2.5)
    bank = demo.bank(shots.adapters)
    aligned = demo.aligned([bank[name] for name in bank.names])
    examples = demo.task_shots(demo.TASK_NAMES[-1])
    weights = np.random.default_rng(0).uniform(-0.5, 0.5, (shots.candidates, shots.adapters))
    for combine, one in (("parameters", Bank.from_adapters(aligned)), ("outputs", bank)):
        adapters = [one[name] for name in one.names]
        baseline = BASELINES[combine].build(demo.base(), adapters, examples, device=settings.device)
        built = _Built(compose.attach(demo.base(), one), baseline, examples, weights)
        yield _point(shots, built, combine, settings)


@dataclass(frozen=True)
class _Built:
    attached: compose.engine.attach.AttachedModel
    baseline: lorahub_baseline.LoraHub
    examples: list[Encoded]
    weights: np.ndarray


def _build(shots: Shots, combine: Combine, settings: Settings) -> _Built:
    model = models.build(shots.model, device=settings.device, dtype=shots.dtype)
    adapters = models.random_adapters(model, shots.model, shots.adapters, shots.rank)
    vocab = models.MODELS[shots.model].config["vocab_size"]
    examples = models.random_examples(vocab, shots.prompts, shots.responses)
    other = models.build(shots.model, device=settings.device, dtype=shots.dtype)
    baseline = BASELINES[combine].build(other, adapters, examples, device=settings.device)
    weights = np.random.default_rng(0).uniform(-0.5, 0.5, (shots.candidates, shots.adapters))
    return _Built(compose.attach(model, Bank.from_adapters(adapters)), baseline, examples, weights)


def _point(shots: Shots, built: _Built, combine: Combine, settings: Settings) -> Point:
    objective = PopulationObjective(built.attached, built.examples, combine=combine)

    def ours() -> np.ndarray:
        return objective(built.weights).losses

    def baseline() -> list[float]:
        return [built.baseline.loss(row) for row in built.weights.tolist()]

    def gate() -> None:
        _check(ours(), baseline(), built.examples, shots.dtype)

    def measure() -> Measured:
        rounds = settings.rounds or (1 if settings.quick else 5)
        timings = interleaved(ours, baseline, device=settings.device, rounds=rounds)
        mine, theirs = (timing.per(len(built.weights)) for timing in timings)
        speed_up = Check("speed-up per candidate", theirs.best / mine.best, ">=", shots.target, "x")
        return Measured([speed_up, *_memory(settings)], mine, theirs, note="times are per candidate")

    dtype = str(shots.dtype).removeprefix("torch.")
    return Point(f"{shots.model} {dtype}, combine={combine}", gate, measure)


def _check(losses_PS: np.ndarray, theirs: Sequence[float], examples: list[Encoded], dtype: torch.dtype) -> None:
    """Losses of equal candidates must agree; in bfloat16 both sides round every layer's output, in another order."""
    tolerance = 5e-5 if dtype == torch.float32 else 5e-3
    ours = torch.from_numpy(lorahub_baseline.token_mean(losses_PS, examples))
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def _memory(settings: Settings) -> list[Check]:
    if not settings.device.startswith("cuda"):
        return []
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return [Check("peak memory of the point, both sides", peak, unit="GiB")]
