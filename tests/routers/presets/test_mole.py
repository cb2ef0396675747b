"""MoLE's gate over pooled outputs and AM-LoRA's attention: gates by their formulas, and they train."""

import math

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.expert_outputs import expert_outputs
from compose.routers.presets.registry import PRESETS, preset


def decided(routed, inputs, *, keep=False):
    with torch.no_grad(), routed.recording(inputs=keep) as decisions:
        routed(**inputs)
    return {each.site: each for each in decisions}


def test_mole_pooled_by_the_formula(routed_over, batch) -> None:
    routed = routed_over("llama", preset("mole_pooled"))
    inputs = batch("llama")
    reads = {}
    for block in range(3):
        target = f"model.layers.{block}.self_attn.q_proj"
        layer = routed.attached.layers[target]
        layer.register_forward_pre_hook(lambda _, args, target=target: reads.__setitem__(target, args[0]))
    found = decided(routed, inputs)
    assert found.keys() == {f"model.layers.{block}" for block in range(3)}
    for name, each in found.items():
        site = routed.router.site(name)
        target = routed.router.layout[name].leader
        outputs = expert_outputs(reads[target].double(), routed.attached.layers[target].stack)[:, :5].mean(
            1
        )  # prompts
        flat = outputs.flatten(-2)
        normed = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        scores = normed @ site.gate.weight.double().T / site.normalise.log_temperature.exp()
        torch.testing.assert_close(each.gates_NE.double(), torch.softmax(scores, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_mole_pooled_never_reads_the_response(name, routed_over, batch) -> None:
    routed, inputs = routed_over(name, preset("mole_pooled")), batch(name)
    changed = {**inputs, "labels": inputs["labels"].clone(), "input_ids": inputs["input_ids"].clone()}
    if name == "t5":
        changed["labels"][:, -3:] = 5
    else:
        changed["input_ids"][:, 5:] = 5
    one, other = decided(routed, inputs), decided(routed, changed)
    assert all(torch.equal(one[site].gates_NE, other[site].gates_NE) for site in one)
    changed["input_ids"][:, 0] = 7
    other = decided(routed, changed)
    assert not all(torch.equal(one[site].gates_NE, other[site].gates_NE) for site in one)


def test_am_lora_by_the_formula(routed_over, batch) -> None:
    routed = routed_over("llama", preset("am_lora"))
    for name, each in decided(routed, batch("llama"), keep=True).items():
        gate = routed.router.site(name).gate
        x = each.x_ND.double()
        keys = expert_outputs(x, each.stack) @ gate.key_CO.double().T
        scores = torch.einsum("nc,nec->ne", x @ gate.query_CD.double().T, keys) / math.sqrt(32)
        torch.testing.assert_close(each.gates_NE.double(), torch.softmax(scores, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mole_pooled", "am_lora"])
@pytest.mark.parametrize("architecture", ["llama", "t5", "bert"])
def test_gates_train(name, architecture, routed_over, batch) -> None:
    routed = routed_over(architecture, preset(name), skip="layers.0").train()
    inputs = batch(architecture) if architecture != "bert" else {**batch("llama"), "labels": torch.tensor([0, 1, 2])}
    routed(**inputs).loss.backward()
    assert routed.last_losses.keys() == {"mole_balance" if name == "mole_pooled" else "l1_gate"}
    for key, parameter in routed.trained_parameters().items():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


def test_limits_are_stated_and_enforced(routed_over, batch) -> None:
    assert "length" in PRESETS["mole_pooled"].limits
    assert PRESETS["am_lora"].limits
    routed = routed_over("llama", preset("mole_pooled", scope="token", pooling="none"))
    with pytest.raises(IncompatibleError, match="scope='sequence'"):
        routed(**batch("llama"))
