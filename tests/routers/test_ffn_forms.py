"""Feed-forward parts are recognised in every model that has one of the forms, and nothing is guessed."""

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.ffn import FfnExperts
from compose.routers.presets.registry import experts_for, preset


def gated_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
        )
    )  # fmt: skip


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(
        PhiConfig(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )


def routed_over_fresh(model, name="mixlora_ffn", dtype=None):
    model = model.eval() if dtype is None else model.eval().to(dtype)
    attached = attach(model, Bank.from_adapters(experts_for(name, model)), trainable=True)
    routed = build(attached, preset(name)).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for layer in attached.layers.values():
            layer.b_RO.add_(torch.randn(layer.b_RO.shape, generator=generator).to(layer.b_RO.dtype) * 0.1)
    return routed


def logits(model):
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(("make", "parts"), [(gated_t5, 4), (phi, 2)])
def test_further_models(make, parts) -> None:
    torch.manual_seed(0)
    routed = routed_over_fresh(make())
    assert sum(isinstance(module, FfnExperts) for module in routed.model.modules()) == parts
    with routed.disable():
        bare = logits(routed.model)
    mixed = logits(routed)
    assert (mixed - bare).abs().max() > 1e-4
    with torch.no_grad():
        for gate in routed.router.gates.values():  # one expert at full strength: the attached adapter
            gate.select.k = 1
            gate.gate.weight_ED.zero_()
    mixed = logits(routed)
    with routed.attached.using("expert_0"):
        torch.testing.assert_close(mixed, logits(routed.model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_low_precision(name, tiny_model) -> None:
    """T5 keeps its last layer in float32 when it is loaded so; gates are float32 everywhere."""
    routed = routed_over_fresh(tiny_model(name), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in routed.router.parameters()} == {torch.float32}
    mixed = logits(routed)
    assert mixed.dtype == torch.bfloat16
    assert mixed.isfinite().all()


def test_a_last_layer_in_float32(tiny_model) -> None:
    model = tiny_model("t5").to(torch.bfloat16)
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            block.layer[-1].DenseReluDense.wo.float()
    routed = routed_over_fresh(model)
    routed.train()(
        input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[8, 9]])
    ).loss.backward()  # fmt: skip
    grads = {name: parameter.grad for name, parameter in routed.trained_parameters().items()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())


def test_targets_of_several_modules_are_refused(tiny_model) -> None:
    model = tiny_model("llama")
    model.model.layers[0].extra = torch.nn.Linear(32, 32)
    experts = Bank.from_adapters(experts_for("mixlora_ffn", model))
    with (
        attach(model, experts, trainable=True) as attached,
        pytest.raises(IncompatibleError, match="lie in 2 modules"),
    ):
        build(attached, preset("mixlora_ffn"))
