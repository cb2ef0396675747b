"""The target a gate reads in the base pass: found by pattern, and what it read is what the gate sees."""

import pytest
import torch

from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.routers.presets.registry import preset
from compose.routers.taps import tap_target, tapped


def test_the_last_match_of_the_body_that_sees_the_prompt(tiny_model, make_experts) -> None:
    pattern = preset("logo").tap
    wanted = {
        "llama": "model.layers.2.self_attn.q_proj",
        "gpt2": "transformer.h.1.attn.c_attn",
        "t5": "encoder.block.1.layer.0.SelfAttention.q",
        "bert": "bert.encoder.layer.1.attention.self.query",
    }
    for name, target in wanted.items():
        model = tiny_model(name)
        with attach(model, make_experts(model)) as attached:
            assert tap_target(attached, pattern) == target


def test_no_match_names_a_target(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    with attach(model, make_experts(model)) as attached, pytest.raises(IncompatibleError, match="down_proj"):
        tap_target(attached, "no_such_layer")


def test_inputs_are_collected_and_the_hook_goes() -> None:
    layer = torch.nn.Linear(2, 3)
    x = torch.randn(4, 2)
    with tapped(layer) as inputs:
        layer(x)
    layer(x)
    assert len(inputs) == 1
    assert inputs[0] is x
    assert not layer._forward_pre_hooks
