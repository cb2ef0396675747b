"""From a preset's name to experts and mixtures."""

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError, UnknownNameError
from compose.routers.builder import build
from compose.routers.presets.registry import FreshExperts, experts_for, preset


def test_three_lines_from_a_model_to_a_routed_model(tiny_model, inputs_of) -> None:
    model = tiny_model("llama")
    bank = Bank.from_adapters(experts_for("molora", model))
    attached = attach(model, bank, trainable=True)
    routed = build(attached, preset("molora"))
    assert routed(**inputs_of("llama")).loss.isfinite()
    assert len(bank.names) == 10


def test_targets_and_seed(tiny_model) -> None:
    model = tiny_model("llama")
    target = "model.layers.0.self_attn.q_proj"
    one, same, other = (experts_for("molora", model, [target], seed=seed)[3].targets[target].a for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert list(experts_for("molora", model, [target])[0].targets) == [target]


def test_presets_over_trained_adapters_make_none(tiny_model) -> None:
    with pytest.raises(IncompatibleError, match="bank of trained adapters"):
        experts_for("xlora", tiny_model("llama"))


def test_a_model_without_fitting_layers(tiny_model) -> None:
    with pytest.raises(IncompatibleError, match="no linear layers"):
        experts_for("loramoe", torch.nn.Linear(3, 3))


def test_experts_outside_the_gates_stand_last(tiny_model) -> None:
    adapters = experts_for("mocle", tiny_model("llama"))
    assert [adapter.name for adapter in adapters] == ["expert_0", "expert_1", "expert_2", "expert_3", "universal"]
    with pytest.raises(IncompatibleError, match="one number of experts"):
        FreshExperts(num_experts=(1, 2), always_on=("u",)).make(tiny_model("llama"), [])


def test_names_and_options_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="mola"):
        preset("molla")
    with pytest.raises(IncompatibleError, match="no option 'top_k'"):
        preset("mola", top_k=2)
    assert preset("mola", noise=0.5).noise == 0.5
