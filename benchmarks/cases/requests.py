"""32 requests for 32 different adapters of the demo's bank: as one batch through compose, against one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft_side import peft_model
from registry import Check, Measured, Point, Settings, case
from timing import interleaved

import compose
from compose.bank import Bank
from compose.demo.assets import demo_bank, demo_base
from compose.engine.generate import generate_tokens
from compose.engine.requests import Request, RunningBatch
from compose.fewshot.loading import load_model

WORDS = "stone river lamp cloud field"


@case(
    "requests",
    description="demo model, 32 requests of 32 different adapters, prompts of 5 lengths, 16 new tokens each, greedy",
    baseline="one request at a time: compose, and PEFT set_adapter",
    targets=">= 3x at every point",
    devices=("cpu", "cuda"),
)
def requests(settings: Settings) -> Iterator[Point]:
    """Yield the fixed batch and the running one, each against both ways of one at a time."""
    count, new = (3, 2) if settings.quick else (32, 16)
    bank = Bank.open(demo_bank())
    names = list(bank.names[:count])
    bank = bank.select(names)
    loaded = load_model(demo_base(), device=settings.device)
    texts = [" ".join(WORDS.split()[: 1 + row % 5]) for row in range(count)]
    prompts = [loaded.tokenizer(loaded.prompt_format.prompt_template.format(input=text)).input_ids for text in texts]
    peft = peft_model(load_model(demo_base(), device=settings.device).model, [bank[name] for name in names],
                      device=settings.device)  # fmt: skip
    attached = compose.attach(loaded.model, bank)

    def batch() -> list[list[int]]:
        return attached.generate(prompts, names, max_new_tokens=new, stop_ids=[])

    def running() -> list[list[int]]:
        rows = RunningBatch(attached, max_rows=max(1, count // 2), stop_ids=[])
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            rows.add(Request(prompt, name, new, id=number))
        found = {finished.request.id: finished.tokens for finished in rows.run()}
        return [found[number] for number in range(count)]

    def alone() -> list[list[int]]:
        pairs = zip(prompts, names, strict=True)
        return [attached.generate([prompt], [name], max_new_tokens=new, stop_ids=[])[0] for prompt, name in pairs]

    def alone_in_peft() -> list[list[int]]:
        found = []
        for prompt, name in zip(prompts, names, strict=True):
            peft.set_adapter(name)
            found += generate_tokens(peft, [prompt], max_new_tokens=new, stop_ids=[])
        return found

    def scores_agree() -> None:
        ids = torch.tensor([prompt[:5] for prompt in prompts], device=settings.device)
        with torch.no_grad(), attached.using(names):
            mine = attached.model(input_ids=ids).logits
        with torch.no_grad():
            theirs = peft(input_ids=ids, adapter_names=names).logits
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)

    ours = {"one batch": batch, f"running batch, {max(1, count // 2)} places": running}
    for label, run in ours.items():
        for other, baseline in {"compose alone": alone, "PEFT alone": alone_in_peft}.items():
            yield _point(f"{label} against {other}", run, baseline, scores_agree, count * new, settings)


def _point(
    label: str,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    scores_agree: Callable[[], None],
    tokens: int,
    settings: Settings,
) -> Point:
    def gate() -> None:
        scores_agree()
        torch.testing.assert_close(torch.tensor(ours()), torch.tensor(baseline()), atol=0, rtol=0)

    def measure() -> Measured:
        rounds = settings.rounds or (1 if settings.quick else 5)
        mine, theirs = interleaved(ours, baseline, device=settings.device, rounds=rounds)
        return Measured(
            [
                Check("speed-up (baseline / ours)", theirs.best / mine.best, ">=", 3.0, "x"),
                Check("ours", tokens / mine.best, unit="tokens/s"),
                Check("baseline", tokens / theirs.best, unit="tokens/s"),
            ],
            mine,
            theirs,
        )

    return Point(label, gate, measure)
