"""Input Gram matrices: equal to the products of what the layers really saw; RegMean through the whole path."""

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.engine.statistics import InputGrams
from compose.errors import IncompatibleError

IDS = torch.tensor([[5, 9, 11, 3], [7, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def seen(model, target: str) -> torch.Tensor:
    """The input of one layer, caught independently of the class under test."""
    caught = []
    handle = model.get_submodule(target).register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("masked", [False, True])
def test_grams_are_those_of_the_inputs_with_each_adapter_in_force(tiny_model, make_bank, masked) -> None:
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached:
        grams = InputGrams(attached)
        for name in attached.bank.names:
            for _ in range(2):
                with grams.of(name, MASK if masked else None):
                    model(IDS)
        found = grams.statistics()
        target = list(attached.layers)[-1]
        for number, name in enumerate(attached.bank.names):
            with attached.using(name):
                x = seen(model, target)[MASK.bool() if masked else slice(None)].reshape(
                    -1, found[target]["input_gram"].shape[1]
                )
            assert_close(found[target]["input_gram"][number], 2 * x.T @ x, atol=1e-4, rtol=1e-4)
        assert attached.active is None
        assert not any(layer._forward_pre_hooks for layer in attached.layers.values())


def test_an_adapter_that_never_ran_is_named(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached:
        grams = InputGrams(attached)
        with grams.of("expert-1"):
            model(IDS)
        with pytest.raises(IncompatibleError, match="expert-0, expert-2, expert-3"):
            grams.statistics()


def test_regmean_takes_them_and_says_when_they_are_missing(tiny_model, make_bank) -> None:
    """With equal inputs for all, RegMean is the mean of the deltas on the span of the inputs."""
    model = tiny_model("llama")
    bank = make_bank(model)
    with pytest.raises(IncompatibleError, match="input_gram"):
        compose.merge(bank, "regmean")
    with compose.attach(model, bank) as attached:
        grams = InputGrams(attached)
        for name in bank.names:
            with grams.of(name):
                model(IDS)
    merged = compose.merge(bank, "regmean", statistics=grams.statistics(), weights={"expert-0": 1.0, "expert-2": 1.0})
    target = "model.layers.0.self_attn.q_proj"
    deltas = [bank[name].targets[target].delta() for name in ("expert-0", "expert-2")]
    assert_close(merged.adapter.targets[target].delta(), sum(deltas) / 2, atol=2e-3, rtol=2e-3)
