"""A training step of mixtures of LoRA experts, and what it saves, beside PEFT's LoRA and X-LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from registry import Check, Measured, Point, Settings, case

from cases._router_side import Mixtures, lora_step, random_batch, ratio, saved_megabytes

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
    batch = random_batch(name, rows, tokens)
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
    yield Point("PEFT LoRA of rank 64", lambda: None, lambda: ratio("rank 64 / rank 8", whole, lora, None, settings))
    theirs = Mixtures(name, "xlora", EXPERTS, RANK)
    yield Point(
        "PEFT X-LoRA, router trains",
        lambda: theirs.check(batch),
        lambda: ratio("PEFT X-LoRA / rank 8", lambda: theirs.peft_step(batch), lora, None, settings),
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
        measured = ratio("step (ours / baseline)", ours, lora, target, settings)
        memory = saved_megabytes(ours) / saved_megabytes(lora)
        measured.checks.append(Check("saved for backward (ours / baseline)", memory, unit="x"))
        return measured

    return Point(label, lambda: mixtures.check(None), measure)
