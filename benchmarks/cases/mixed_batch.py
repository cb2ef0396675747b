"""A batch of 32 rows with 1, 8 or 32 different adapters out of a bank of 32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import torch
from peft_side import peft_model
from registry import Check, Measured, Point, Settings, case
from timing import interleaved

import compose
from compose.bank import Bank
from compose.engine.coefficients import AdapterIds


@case(
    "mixed_batch",
    description="32 rows, 1/8/32 distinct adapters of a bank of 32, prompt (S=64) and decode (S=1) shapes, 8.4M Llama",
    baseline="PEFT adapter_names=",
    targets="ahead at every point, >= 3x at 32 adapters decode",
    devices=("cpu", "cuda"),
)
def mixed_batch(settings: Settings) -> Iterator[Point]:
    """Yield one point per shape and number of adapters."""
    name, rows, bank_size, rank = ("llama-tiny", 4, 4, 2) if settings.quick else ("llama-8m", 32, 32, 8)
    plain = models.build(name, device=settings.device)
    adapters = models.random_adapters(plain, name, bank_size, rank)
    attached = compose.attach(plain, Bank.from_adapters(adapters))
    peft = peft_model(models.build(name, device=settings.device), adapters, device=settings.device)
    vocab = models.MODELS[name].config["vocab_size"]
    for length in (8, 1) if settings.quick else (64, 1):
        tokens = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(length))
        for distinct in (1, bank_size) if settings.quick else (1, 8, 32):
            ids = torch.arange(rows) % distinct
            yield _point(attached, peft, tokens.to(settings.device), ids.to(settings.device), settings)


def _point(attached: Any, peft: Any, tokens: torch.Tensor, ids: torch.Tensor, settings: Settings) -> Point:
    names = [f"adapter-{index}" for index in ids.tolist()]
    kept = AdapterIds(ids)
    distinct, length = len(set(names)), tokens.shape[1]

    def ours() -> torch.Tensor:
        # A batch of prompts is grouped once; the decode steps that follow use that grouping again.
        selection = kept if length == 1 else AdapterIds(ids)
        with torch.no_grad(), attached.using(selection):
            return attached.model(input_ids=tokens, use_cache=False).logits

    def baseline() -> torch.Tensor:
        with torch.no_grad():
            return peft(input_ids=tokens, use_cache=False, adapter_names=names).logits

    def gate() -> None:
        torch.testing.assert_close(ours(), baseline(), atol=1e-5, rtol=1e-5)

    def measure() -> Measured:
        rounds = settings.rounds or (1 if settings.quick else 9)
        mine, theirs = interleaved(ours, baseline, device=settings.device, rounds=rounds)
        wanted = 3.0 if distinct == 32 and length == 1 else 1.0
        return Measured(
            [Check("speed-up (baseline / ours)", theirs.best / mine.best, ">=", wanted, "x")], mine, theirs
        )

    return Point(f"{distinct} distinct adapters, S={length}, B={len(tokens)}", gate, measure)
