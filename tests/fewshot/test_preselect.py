"""Preselection keeps what is best alone; halving agrees with measuring everything."""

import numpy as np
import pytest
import torch

import compose
from compose.errors import ComposeError
from compose.fewshot.encoding import encode
from compose.fewshot.losses import response_losses
from compose.fewshot.preselect import preselect_at_random, preselect_by_loss, preselect_by_ranker, single_losses


@pytest.fixture
def shots(loaded, task):
    return encode(task[:4], loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)


def test_single_losses_equal_one_adapter_at_a_time(loaded, bank, shots) -> None:
    with compose.attach(loaded.model, bank) as attached:
        found = single_losses(attached, shots, range(6), max_tokens=50)
        for index, name in enumerate(bank.names):
            with attached.using(name), torch.no_grad():
                np.testing.assert_allclose(found[index], response_losses(loaded.model, shots).numpy(), atol=2e-5)


def test_the_adapter_that_solves_the_task_survives(loaded, bank, shots) -> None:
    with compose.attach(loaded.model, bank) as attached:
        chosen = preselect_by_loss(attached, shots, keep=2)
    assert len(chosen.names) == 2
    assert "skill-2" in chosen.names
    assert min(chosen.alone, key=chosen.alone.get) == "skill-2"
    assert chosen.cost < 6 + 6


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
