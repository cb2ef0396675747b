"""Scores: exact match of what is generated, options by likelihood, intervals that cover."""

import numpy as np
import torch

import compose
from compose.fewshot.scoring import constant_scores, interval, score
from compose.text.examples import Example


def test_the_right_adapter_scores_and_order_is_kept(loaded, bank, task) -> None:
    """The task's outputs were written by skill-2; only their first characters are bound to come again."""
    with compose.attach(loaded.model, bank) as attached:
        with attached.using("skill-2"):
            right = score(loaded, task)
        with attached.using(None):
            wrong = score(loaded, task)
    starts = [text.startswith(item.output) for text, item in zip(right.texts, task, strict=True)]
    assert all(starts)
    assert not any(text.startswith(item.output) for text, item in zip(wrong.texts, task, strict=True))
    assert right.losses.mean() < wrong.losses.mean() - 1
    assert right.options is None


def test_exact_match_strips_white_space_only(loaded, bank) -> None:
    items = [Example("say oak", "x")]
    with compose.attach(loaded.model, bank) as attached, attached.using("skill-2"):
        (text,) = score(loaded, items).texts
        assert score(loaded, [Example("say oak", f" {text} \n")]).exact.tolist() == [
            False
        ]  # longer: generation goes on
    assert constant_scores([Example("a", " yes\n"), Example("b", "Yes")], "yes").exact.tolist() == [True, False]


def test_options_are_ranked_by_summed_log_likelihood(loaded, bank, task) -> None:
    items = [Example(item.input, item.output, (item.output, "zzz", "q")) for item in task[:4]]
    with compose.attach(loaded.model, bank) as attached, attached.using("skill-2"):
        found = score(loaded, items).options
        losses = [[_total(loaded, item.input, choice) for choice in item.choices] for item in items]
    assert found.tolist() == [int(np.argmin(row)) == 0 for row in losses]


def _total(loaded, prompt: str, choice: str) -> float:
    ids = loaded.tokenizer(f"{prompt}\n").input_ids
    response = [*loaded.tokenizer(choice).input_ids, 1]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum"))


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        found = interval(generator.random(60) < 0.7, samples=300, seed=seed)
        assert found.low <= found.mean <= found.high
        covered += found.low <= 0.7 <= found.high
    assert 175 <= covered <= 199
