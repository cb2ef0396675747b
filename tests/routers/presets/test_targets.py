"""Presets of one part of the layer route that part alone, on the names of every architecture."""

import re

import pytest

from compose.routers.experts import linear_targets
from compose.routers.presets.registry import PRESETS, experts_for
from compose.routers.sites import is_attention
from compose.routers.target_patterns import ATTENTION, FEED_FORWARD

FFN = ("loramoe", "moral", "moral_top2", "llava_mole", "mixlora_lin")
ATTN = ("adamole", "lora_mixer")


def test_patterns_cut_targets_in_two(any_model) -> None:
    targets = linear_targets(any_model)
    attention = {target for target in targets if re.search(ATTENTION, target)}
    forward = {target for target in targets if re.search(FEED_FORWARD, target)}
    assert attention == {target for target in targets if is_attention(target)}
    assert forward == set(targets) - attention
    assert attention
    assert forward


@pytest.mark.parametrize("name", FFN + ATTN)
def test_experts_stand_on_the_presets_part(name, any_model) -> None:
    for adapter in experts_for(name, any_model):
        assert {is_attention(target) for target in adapter.targets} == {name in ATTN}


@pytest.mark.parametrize("name", FFN + ATTN)
def test_other_targets_of_the_bank_get_no_adapter(name, small) -> None:
    entry = PRESETS[name]
    mixture = small(entry.spec, targets="layers", experts=4)
    mixture.run()
    query, up = "layers.0.attn.q_proj", "layers.0.mlp.up_proj"
    untouched, mixed = (query, up) if name in FFN else (up, query)
    assert (mixture.outputs[untouched] == mixture.base(untouched)).all()
    assert (mixture.outputs[mixed] != mixture.base(mixed)).any()


def test_the_ffns_linear_layers_share_a_gate_that_reads_its_input(routed_preset, inputs_of) -> None:
    routed = routed_preset("mixlora_lin", "llama", awake=True)
    assert list(routed.router.layout) == [f"model.layers.{layer}:feed_forward" for layer in range(3)]
    assert [target.rpartition(".")[2] for target in routed.router.layout["model.layers.0:feed_forward"].targets] == [
        "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert routed.router.site("model.layers.0:feed_forward").gate.weight_ED.shape == (8, 32)
    with routed.recording() as decisions:
        routed(**inputs_of("llama"))
    assert len(decisions) == 3
