"""Logits and gradients equal PEFT's: one adapter, mixed batches by ``adapter_names=``, and ``cat`` merges."""

import copy

import pytest
import torch
from torch.testing import assert_close

import compose
from compose.bank import Bank

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bert": ["query", "value", "dense"],
}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def peft_model(model, name: str, **options):
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[name], init_lora_weights=False,
                        fan_in_fan_out=name == "gpt2", **options)
        for rank in (4, 4, 4)
    ]  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(model), configs[0], adapter_name="x")
    for adapter, config in zip("yz", configs[1:], strict=True):
        wrapped.add_adapter(adapter, config)
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.mul_(0.3)
    return wrapped.eval()


@pytest.fixture(params=sorted(TARGETS))
def pair(request, tiny_model, tmp_path):
    """(our base model, our bank, PEFT's model), same weights."""
    model = tiny_model(request.param)
    wrapped = peft_model(model, request.param)
    wrapped.save_pretrained(str(tmp_path))
    return model, Bank.open([tmp_path / name for name in "xyz"]), wrapped


def test_one_adapter(pair, run_model) -> None:
    model, bank, wrapped = pair
    with compose.attach(model, bank) as attached:
        for name in "xyz":
            wrapped.set_adapter(name)
            attached.set(name)
            assert_close(run_model(model), run_model(wrapped), **TOLERANCE)


def test_mixed_batch(pair, run_model) -> None:
    model, bank, wrapped = pair
    with compose.attach(model, bank) as attached:
        attached.set(["y", None, "x"])
        wanted = run_model(wrapped, adapter_names=["y", "__base__", "x"])
        assert_close(run_model(model), wanted, **TOLERANCE)


def test_cat_merge(pair, run_model) -> None:
    model, bank, wrapped = pair
    weights = [0.6, -0.4, 0.9]
    wrapped.add_weighted_adapter(list("xyz"), weights, "merged", combination_type="cat")
    wrapped.set_adapter("merged")
    with compose.attach(model, bank) as attached:
        attached.set(dict(zip("xyz", weights, strict=True)))
        assert_close(run_model(model), run_model(wrapped), **TOLERANCE)


def test_gradients_of_the_factors(pair, run_model) -> None:
    model, bank, wrapped = pair
    wrapped.set_adapter("y")
    for key, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in key and ".y." in key)
    run_model(wrapped).square().mean().backward()
    wanted = {
        key.removeprefix("base_model.model.").replace(".lora_A.y.weight", ""): parameter.grad
        for key, parameter in wrapped.named_parameters()
        if "lora_A.y" in key
    }
    with compose.attach(model, bank, trainable=True) as attached:
        attached.set("y")
        run_model(model).square().mean().backward()
        for target, layer in attached.layers.items():
            rows = slice(layer.stack.offsets[1], layer.stack.offsets[2])
            assert_close(layer.a_RD.grad[rows], wanted[target], **TOLERANCE)
            others = torch.cat([layer.a_RD.grad[: rows.start], layer.a_RD.grad[rows.stop :]])
            assert others.abs().max() == 0
