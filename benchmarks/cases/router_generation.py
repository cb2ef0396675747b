"""Generation with mixtures of LoRA experts beside PEFT's LoRA, which keeps a cache, and X-LoRA, which keeps none."""

from __future__ import annotations

from collections.abc import Iterator

from registry import Point, Settings, case

from cases._router_side import Mixtures, lora_step, random_batch, ratio

EXPERTS, RANK = 8, 8


@case(
    "router_generation",
    description="32 new tokens after prompts of 32, 4 rows, the same Llama and experts, greedy",
    baseline="PEFT LoRA of rank 8 with its cache",
    targets="X-LoRA <= 1.6, token router <= 1.15 of the baseline's time",
)
def router_generation(settings: Settings) -> Iterator[Point]:
    """Yield X-LoRA, token routers, two passes without adapters, and PEFT's X-LoRA, which keeps no cache."""
    name, rows, tokens = ("llama-tiny", 2, 6) if settings.quick else ("llama-20m", 4, 32)
    prompt = random_batch(name, rows, tokens)["input_ids"]
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
            lambda m=mixtures, t=target: ratio(
                "generation (ours / baseline)", lambda: m.generate(prompt, tokens), lora, t, settings
            ),
        )
    theirs = Mixtures(name, "xlora", EXPERTS, RANK)
    yield Point(
        "the bare model, twice",
        theirs.check_bare,
        lambda: ratio(
            "two passes without adapters / baseline",
            lambda: theirs.generate_bare(prompt, tokens, 2),
            lora,
            None,
            settings,
        ),
    )
    yield Point(
        "PEFT X-LoRA",
        lambda: theirs.check(None),
        lambda: ratio(
            "PEFT X-LoRA / baseline",
            lambda: theirs.peft_generate(prompt, tokens),
            lora,
            None,
            Settings(quick=settings.quick, device=settings.device, rounds=1),
        ),
    )
