"""GOAT: segments of the spectrum as experts, the residual as base (arXiv:2502.16894)."""

import math

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.presets.registry import experts_for, preset

TARGET = "model.layers.1.mlp.down_proj"


def test_experts_are_segments_of_the_weight(tiny_model) -> None:
    model = tiny_model("llama")
    experts = experts_for("goat", model, [TARGET])
    weight = model.get_submodule(TARGET).weight.detach()  # (32, 48): 8 segments of 4 values
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for index, adapter in enumerate(experts):
        part = slice(4 * index, 4 * index + 4)
        update = adapter.targets[TARGET]
        assert update.scaling == math.sqrt(3 * 48 / 4)
        torch.testing.assert_close(update.delta(), u[:, part] * s[part] @ v[part] / 10, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(update.a.norm(dim=1), update.b.norm(dim=0), rtol=1e-4, atol=1e-6)  # roots on both
    total = sum(adapter.targets[TARGET].delta() for adapter in experts)
    torch.testing.assert_close(total, weight / 10, rtol=1e-4, atol=1e-6)


def test_uniform_gates_at_the_start_are_the_base_model(tiny_model, inputs_of) -> None:
    """``W - mean s B A + Σ (1/E) s B A = W``."""
    from compose.routers.gates.linear import LinearGate
    from compose.routers.selectors.every import All

    model, inputs = tiny_model("llama"), inputs_of("llama")
    with torch.no_grad():
        bare = model(**inputs).logits
        attached = attach(model, Bank.from_adapters(experts_for("goat", model)), trainable=True)
        routed = build(attached, preset("goat", gate=LinearGate(init="zeros"), select=All()))
        torch.testing.assert_close(routed(**inputs).logits, bare, rtol=1e-4, atol=1e-5)


def test_the_residual_by_hand(small) -> None:
    mixture = small(preset("goat"))
    start = mixture.attached.layers["layers.0.mlp.up_proj"]
    mixture.run()
    mean = mixture.deltas().mean(0)
    with torch.no_grad():
        for factor in (start.a_RD, start.b_RO):
            factor.mul_(1.7)  # training moves the experts, not what was subtracted
    output = mixture.run()
    probs = torch.softmax(mixture.read() @ mixture.gate.weight_ED.detach().double().T, -1)
    best = probs.topk(2, dim=-1)
    gates = torch.zeros_like(probs).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(output, mixture.by_hand(gates) - mean, rtol=1e-5, atol=1e-6)


def test_the_base_is_never_edited(tiny_model, inputs_of) -> None:
    model, inputs = tiny_model("llama"), inputs_of("llama")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        bare = model(**inputs).logits
    attached = attach(model, Bank.from_adapters(experts_for("goat", model)), trainable=True)
    routed = build(attached, preset("goat"))
    routed.train()(**inputs).loss.backward()
    with torch.no_grad():
        assert not torch.equal(routed.eval()(**inputs).logits, bare)
        with routed.disable():
            assert torch.equal(model(**inputs).logits, bare)
    attached.detach()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_start_is_saved_with_the_mixture(small) -> None:
    mixture = small(preset("goat"))
    saved = [name for name in mixture.routed.mixer.state_dict() if name.endswith(("a_RD", "b_RO"))]
    assert len(saved) == 2


def test_narrow_weights_get_a_smaller_rank_or_are_refused() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16)})])
    update = experts_for("goat", model)[7].targets["layers.0.q_proj"]
    assert update.rank == 2
    assert update.scaling == math.sqrt(3 * 16 / 2)
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 7)})])
    with pytest.raises(IncompatibleError, match="segments of its 7 singular values hold 0 each"):
        experts_for("goat", model)
