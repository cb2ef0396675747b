"""One adapter for the whole batch: what the composed layers cost over PEFT's own LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator

import models
import torch
from peft_side import peft_model
from registry import Check, Measured, Point, Settings, case
from timing import interleaved

import compose
from compose.bank import Bank


@case(
    "single_adapter_forward",
    description="one rank-8 adapter on all seven projections of an 8.4M Llama, prompt and decode shapes",
    baseline="PEFT LoRA (one adapter loaded, not merged)",
    targets="ours / baseline <= 1.05",
    devices=("cpu", "cuda"),
)
def single_adapter_forward(settings: Settings) -> Iterator[Point]:
    """Yield a prompt point (B=4, S=64) and a decode point (B=32, S=1), alone in the bank and in a bank of 32."""
    name, rank = ("llama-tiny", 2) if settings.quick else ("llama-8m", 8)
    vocab = models.MODELS[name].config["vocab_size"]
    peft = None
    for bank_size in (1, 3) if settings.quick else (1, 32):
        model = models.build(name, device=settings.device)
        adapters = models.random_adapters(model, name, bank_size, rank)
        if peft is None:
            peft = peft_model(models.build(name, device=settings.device), adapters[:1], device=settings.device)
        attached = compose.attach(model, Bank.from_adapters(adapters))
        attached.set("adapter-0")
        for rows, length in ((2, 8), (4, 1)) if settings.quick else ((4, 64), (32, 1)):
            tokens = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(length))
            label = f"B={rows}, S={length}, bank of {bank_size}"
            yield _point(label, model, peft, tokens.to(settings.device), settings)


def _point(
    label: str, model: torch.nn.Module, peft: torch.nn.Module, tokens: torch.Tensor, settings: Settings
) -> Point:
    def ours() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits

    def baseline() -> torch.Tensor:
        with torch.no_grad():
            return peft(input_ids=tokens, use_cache=False).logits

    def gate() -> None:
        torch.testing.assert_close(ours(), baseline(), atol=1e-5, rtol=1e-5)

    def measure() -> Measured:
        rounds = settings.rounds or (1 if settings.quick else 15)
        mine, theirs = interleaved(ours, baseline, device=settings.device, rounds=rounds)
        return Measured([Check("overhead (ours / baseline)", mine.best / theirs.best, "<=", 1.05, "x")], mine, theirs)

    return Point(label, gate, measure)
