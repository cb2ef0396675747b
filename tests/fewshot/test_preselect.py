"""Preselection keeps what is best alone; halving agrees with measuring everything."""

import numpy as np
import pytest
import torch

import compose
from compose.errors import ComposeError
from compose.fewshot.losses import response_losses
from compose.fewshot.preselect import preselect_at_random, preselect_by_loss, preselect_by_ranker, single_losses
from compose.text.encoding import Encoded, encode


@pytest.fixture
def shots(loaded, task):
    return encode(task[:4], loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)


def test_single_losses_equal_one_adapter_at_a_time(loaded, bank, shots) -> None:
    with compose.attach(loaded.model, bank) as attached:
        found = single_losses(attached, shots, range(6))
        for index, name in enumerate(bank.names):
            with attached.using(name), torch.no_grad():
                np.testing.assert_allclose(found[index], response_losses(loaded.model, shots).numpy(), atol=2e-5)


def test_the_adapter_that_solves_the_task_survives(loaded, bank, shots) -> None:
    with compose.attach(loaded.model, bank) as attached:
        chosen = preselect_by_loss(attached, shots, keep=2)
    assert len(chosen.names) == 2
    assert "skill-2" in chosen.names
    assert min(chosen.alone, key=chosen.alone.get) == "skill-2"
    assert chosen.cost <= 6 + 6 + 5


def test_the_partner_of_a_pair_survives_though_it_is_bad_alone(loaded, bank) -> None:
    """The outputs are written by skills 3 and 5 together; 5 alone is the worst of all."""
    from compose.engine.generate import generate_tokens

    prompts = ["say oak", "say elm", "say ash", "say fir"]
    ids = [loaded.tokenizer(f"{prompt}\n").input_ids for prompt in prompts]
    with compose.attach(loaded.model, bank) as attached:
        with attached.using({"skill-3": 1.0, "skill-5": 1.0}):
            rows = generate_tokens(loaded.model, ids, max_new_tokens=6, stop_ids=[1])
        shots = [Encoded(tuple(prompt), (*row, 1)) for prompt, row in zip(ids, rows, strict=True)]
        alone = single_losses(attached, shots, range(6)).mean(axis=1)
        chosen = preselect_by_loss(attached, shots, keep=2)
    assert np.argsort(alone).tolist() == [3, 4, 0, 2, 1, 5]
    assert chosen.names == ("skill-3", "skill-5")


def test_keeping_everything_keeps_the_order(loaded, bank, shots) -> None:
    with compose.attach(loaded.model, bank) as attached:
        assert preselect_by_loss(attached, shots, keep=9).names == bank.names


def test_random_draws_depend_on_the_seed_only() -> None:
    names = [f"n{i}" for i in range(30)]
    first = preselect_at_random(names, 5, 7).names
    assert first == preselect_at_random(names, 5, 7).names
    assert len(set(first)) == 5
    assert first != preselect_at_random(names, 5, 8).names


def test_a_ranker_decides_and_is_checked(task) -> None:
    names = ("a", "b", "c")
    assert preselect_by_ranker(names, 2, lambda _: ["c", "a", "b"], task).names == ("a", "c")
    with pytest.raises(ComposeError, match="needs a ranker"):
        preselect_by_ranker(names, 2, None, task)
    with pytest.raises(ComposeError, match="unknown: \\['z'\\]"):
        preselect_by_ranker(names, 2, lambda _: ["z", "a"], task)
