"""Mixtures of LoRA experts: a training step, generation and memory beside PEFT's LoRA and X-LoRA in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import models
import torch
from registry import Check, Measured, Point, Settings, case
from timing import Timing, interleaved

from cases._router_side import Mixtures, lora_step, saved_megabytes

EXPERTS, RANK = 8, 8


@case(
    "router_training",
    description="forward and backward of a 20.5M Llama, 8 experts of rank 8 on all seven projections, 16 rows of 64",
    baseline="PEFT LoRA of rank 8",
    targets="X-LoRA <= 1.25, dense token router (router and experts) <= 1.15 of the baseline's time",
)
def router_training(settings: Settings) -> Iterator[Point]:
    """Yield X-LoRA, dense and top-2 token routers, and PEFT's X-LoRA and LoRA of the whole rank for comparison."""
    name, rows, tokens = ("llama-tiny", 2, 8) if settings.quick else ("llama-20m", 16, 64)
    batch = _batch(name, rows, tokens)
    lora = lora_step(name, RANK, batch)
    kinds = {
        "X-LoRA, router trains": ("xlora", 1.25),
        "X-LoRA per target, router trains": ("xlora_layerwise", None),
        "dense token router, router and experts train": ("dense_both", 1.15),
        "dense token router, router trains": ("dense", None),
        "top-2 token router, router and experts train": ("top2_both", None),
    }
    for label, (kind, target) in kinds.items():
        mixtures = Mixtures(name, kind, EXPERTS, RANK)
        yield _step_point(label, mixtures, lambda m=mixtures: m.step(batch), lora, target, settings)
    whole = lora_step(name, RANK * EXPERTS, batch)
    yield Point("PEFT LoRA of rank 64", lambda: None, lambda: _ratio("rank 64 / rank 8", whole, lora, None, settings))
    theirs = Mixtures(name, "xlora", EXPERTS, RANK)
    yield Point(
        "PEFT X-LoRA, router trains",
        lambda: theirs.check(batch),
        lambda: _ratio("PEFT X-LoRA / rank 8", lambda: theirs.peft_step(batch), lora, None, settings),
    )


def _step_point(
    label: str,
    mixtures: Mixtures,
    ours: Callable[[], object],
    lora: Callable[[], object],
    target: float | None,
    settings: Settings,
) -> Point:
    def measure() -> Measured:
        measured = _ratio("step (ours / baseline)", ours, lora, target, settings)
        memory = saved_megabytes(ours) / saved_megabytes(lora)
        measured.checks.append(Check("saved for backward (ours / baseline)", memory, unit="x"))
        return measured

    return Point(label, lambda: mixtures.check(None), measure)


def _ratio(
    what: str, ours: Callable[[], object], lora: Callable[[], object], target: float | None, settings: Settings
) -> Measured:
    rounds = settings.rounds or (1 if settings.quick else 5)
    mine, theirs = interleaved(ours, lora, device=settings.device, rounds=rounds)
    return Measured([_check(what, mine, theirs, target)], mine, theirs)


def _check(what: str, mine: Timing, theirs: Timing, target: float | None) -> Check:
    value = mine.best / theirs.best
    return Check(what, value, unit="x") if target is None else Check(what, value, "<=", target, "x")


@case(
    "router_generation",
    description="32 new tokens after prompts of 32, 4 rows, the same Llama and experts, greedy",
    baseline="PEFT LoRA of rank 8 with its cache",
    targets="X-LoRA <= 1.6, token router <= 1.15 of the baseline's time",
)
def router_generation(settings: Settings) -> Iterator[Point]:
    """Yield X-LoRA and token routers, and PEFT's X-LoRA, which keeps no cache."""
    name, rows, tokens = ("llama-tiny", 2, 6) if settings.quick else ("llama-20m", 4, 32)
    prompt = _batch(name, rows, tokens)["input_ids"]
    lora = lora_step(name, RANK, {"input_ids": prompt}, generate=tokens)
    for label, kind, target in (
        ("X-LoRA, two caches", "xlora", 1.6),
        ("dense token router", "dense", 1.15),
        ("top-2 token router", "top2", 1.15),
    ):
        mixtures = Mixtures(name, kind, EXPERTS, RANK)
        yield Point(
            label,
            lambda m=mixtures: m.check(None),
            lambda m=mixtures, t=target: _ratio(
                "generation (ours / baseline)", lambda: m.generate(prompt, tokens), lora, t, settings
            ),
        )
    theirs = Mixtures(name, "xlora", EXPERTS, RANK)
    yield Point(
        "PEFT X-LoRA",
        lambda: theirs.check(None),
        lambda: _ratio(
            "PEFT X-LoRA / baseline",
            lambda: theirs.peft_generate(prompt, tokens),
            lora,
            None,
            Settings(quick=settings.quick, device=settings.device, rounds=1),
        ),
    )


@case(
    "router_sparsity",
    description="forward of the same Llama over 64 experts of rank 8, 16 rows of 64 tokens, top-2 and dense gates",
    baseline="the same router with all 64 experts",
    targets="top-2 < 1.0 of dense gates",
)
def router_sparsity(settings: Settings) -> Iterator[Point]:
    """Yield one point: what choosing 2 of 64 saves."""
    name, rows, tokens, experts = ("llama-tiny", 2, 8, 4) if settings.quick else ("llama-20m", 16, 64, 64)
    batch = _batch(name, rows, tokens)
    few, every = Mixtures(name, "top2", experts, RANK), Mixtures(name, "dense", experts, RANK)
    yield Point(
        f"2 of {experts}",
        lambda: few.check(None),
        lambda: _ratio(
            "top-2 / dense",
            lambda: few.forward(batch),
            lambda: every.forward(batch),
            None if settings.quick else 1.0,
            settings,
        ),
    )


def _batch(name: str, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    vocab = models.MODELS[name].config["vocab_size"]
    ids = torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}
