"""HydraLoRA's sum by hand (arXiv:2404.19245)."""

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.presets.registry import experts_for, preset


def test_one_a_many_b(tiny_model, inputs_of, wake) -> None:
    model = tiny_model("llama").double()
    attached = attach(model, Bank.from_adapters(experts_for("hydralora", model)))
    routed = build(attached, preset("hydralora")).eval()
    wake(routed)
    target, seen = "model.layers.1.mlp.up_proj", {}
    layer = attached.layers[target]
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad():
        routed(**inputs_of("llama"))
    x, experts, gate = seen["x"], routed.mixer.structure(target), routed.router.site(target).gate
    probs = torch.softmax(x @ gate.weight_ED.detach().double().T, -1)
    h = x @ experts.a_rD.detach().double().T
    expected = layer.base_layer(x).detach()
    for expert in range(4):
        expected += 8.0 * probs[..., expert, None] * (h @ experts.b_ErO[expert].detach().double())  # 32 / 4
    torch.testing.assert_close(seen["y"], expected, rtol=1e-6, atol=1e-6)
    assert sum(value.numel() for name, value in experts.named_parameters() if name == "a_rD") == 4 * 32


def test_experts_must_share_a(tiny_model) -> None:
    model = tiny_model("llama")
    adapters = fresh_experts(model, linear_targets(model), num_experts=2, rank=4)
    with pytest.raises(IncompatibleError, match="init='tied'"):
        build(attach(model, Bank.from_adapters(adapters)), preset("hydralora"))
