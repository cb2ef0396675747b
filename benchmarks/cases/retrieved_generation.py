"""Retrieve and generate for 32 mixed inputs of the demo: all rows in one batch, against one adapter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft_side import peft_model
from registry import Check, Measured, Point, Settings, case
from timing import interleaved

import compose
from compose.bank import Bank
from compose.demo.assets import demo_bank, demo_base
from compose.demo.tasks import TASKS
from compose.engine.generate import generate_tokens
from compose.engine.rows import row_weights, rows_selection
from compose.fewshot.loading import load_model
from compose.retriever.composition import Composer
from compose.retriever.encoders import HiddenStateEncoder
from compose.retriever.retriever import Retriever

SAMPLES = 20
Answer = Callable[[], list[list[int]]]


@case(
    "retrieved_generation",
    description="demo model, 32 mixed inputs of 32 tasks, retrieved by hidden states, 16 new tokens, greedy",
    baseline="one adapter (or set of adapters) at a time through PEFT: rows that share it are one batch",
    targets=">= 3x at every point",
    devices=("cpu", "cuda"),
)
def retrieved_generation(settings: Settings) -> Iterator[Point]:
    """Yield top-1 selection, and a mixture of three; retrieval itself is part of both sides."""
    count, new = (4, 2) if settings.quick else (32, 16)
    bank = Bank.open(demo_bank())
    names = list(bank.names[: 6 if settings.quick else None])
    bank = bank.select(names)
    loaded = load_model(demo_base(), device=settings.device)
    other = load_model(demo_base(), device=settings.device).model
    peft = peft_model(other, [bank[name] for name in names], device=settings.device)
    attached = compose.attach(loaded.model, bank)
    inputs = {name: [item.input for item in TASKS[name].sample("benchmark", SAMPLES)] for name in names}
    retriever = Retriever.fit(HiddenStateEncoder(attached, loaded.tokenizer), inputs)
    texts = [TASKS[name].sample("benchmark", 1, "test")[0].input for name in names[:count]]
    template = loaded.prompt_format.prompt_template
    prompts = [loaded.tokenizer(template.format(input=text)).input_ids for text in texts]
    for mode, k in (("selection", 1), ("mixture", 3)):
        options: dict[str, Any] = {"mode": mode, "k": k}

        def ours(options: dict[str, Any] = options) -> list[list[int]]:
            composed = Composer(**options)(retriever, texts)
            rows = composed.rows()
            return attached.generate(prompts, rows, max_new_tokens=new, stop_ids=[], combine=composed.combine)

        def baseline(options: dict[str, Any] = options) -> list[list[int]]:
            rows = Composer(**options)(retriever, texts).rows()
            return _one_at_a_time(peft, prompts, rows, new)

        def scores_agree(options: dict[str, Any] = options) -> None:
            composed = Composer(**options)(retriever, texts)
            rows = [row_weights(bank, row) for row in composed.rows()]
            ids = torch.tensor([prompt[:5] for prompt in prompts], device=settings.device)
            selection = rows_selection(rows, combine=composed.combine, device=attached.device)
            with torch.no_grad(), attached.using(selection):
                mine = attached.model(input_ids=ids).logits
            pairs = zip(ids, composed.rows(), strict=True)
            with torch.no_grad():
                theirs = [_scores_alone(peft, row, weighted) for row, weighted in pairs]
            torch.testing.assert_close(mine, torch.cat(theirs), atol=1e-4, rtol=1e-4)

        sets = len({tuple(sorted(row)) for row in Composer(**options)(retriever, texts).rows()})
        label = f"{mode}, k={k}: {count} rows, {sets} different {'adapters' if k == 1 else 'sets'}"
        yield _point(label, ours, baseline, scores_agree, count * new, settings)


def _one_at_a_time(
    peft: Any, prompts: Sequence[list[int]], rows: Sequence[Mapping[str, float]], new: int
) -> list[list[int]]:
    """Rows that have the same adapters and weights are one batch; sets are concatenated by PEFT, which is exact."""
    groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(tuple(sorted(row.items())), []).append(place)
    found: list[list[int]] = [[] for _ in rows]
    for weighted, places in groups.items():
        _activate(peft, weighted)
        answers = generate_tokens(peft, [prompts[place] for place in places], max_new_tokens=new, stop_ids=[])
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
        _deactivate(peft, weighted)
    return found


def _scores_alone(peft: Any, ids: torch.Tensor, weighted: Mapping[str, float]) -> torch.Tensor:
    pairs = sorted(weighted.items())
    _activate(peft, pairs)
    logits = peft(input_ids=ids[None]).logits
    _deactivate(peft, pairs)
    return logits


def _activate(peft: Any, weighted: Sequence[tuple[str, float]]) -> None:
    if len(weighted) == 1:
        peft.set_adapter(weighted[0][0])
        return
    names, weights = map(list, zip(*weighted, strict=True))
    peft.add_weighted_adapter(names, weights, "mixed", combination_type="cat")
    peft.set_adapter("mixed")


def _deactivate(peft: Any, weighted: Sequence[tuple[str, float]]) -> None:
    if len(weighted) > 1:
        peft.set_adapter(weighted[0][0])  # PEFT warns when the active adapter is deleted
        peft.delete_adapter("mixed")


def _point(
    label: str, ours: Answer, baseline: Answer, scores_agree: Callable[[], None], tokens: int, settings: Settings
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
