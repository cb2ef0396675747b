"""Arrow: gates by the formula, with any ranks and missing experts; mixed outputs and mixed parameters differ."""

import pytest
import torch

from compose.kernels.mixture_lora.op import mixture_lora
from compose.routers.context import RoutingContext
from compose.routers.gates.proto import ProtoGate
from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import preset
from compose.routers.steps import Seen


def decided(routed, inputs):
    """Site -> decisions with the inputs of its target."""
    with torch.no_grad(), routed.recording(inputs=True) as decisions:
        routed(**inputs)
    return {each.site: each for each in decisions}


def reference(each, k, temperature=1.0):
    """Dense gates in float64 from the target's factors and inputs."""
    x = each.x_ND.double()
    scores = torch.full((len(x), each.stack.num_adapters), float("-inf"), dtype=torch.float64)
    for expert, rank in enumerate(each.stack.ranks):
        if rank:
            a, b = each.stack.factors(expert)
            scores[:, expert] = (x @ torch.linalg.svd(b.double().T @ a.double()).Vh[0]).abs()
    kept = torch.zeros_like(scores).scatter(1, scores.topk(k).indices, 1.0).bool()
    return torch.softmax(scores.masked_fill(~kept, float("-inf")) / temperature, -1)


@pytest.mark.parametrize("skip", ["", "layers.0"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert"])
def test_gates_by_the_formula(architecture, skip, routed_over, batch) -> None:
    routed = routed_over(architecture, preset("arrow"), skip=skip)
    inputs = batch(architecture)
    if architecture == "bert":
        inputs.pop("labels")
    for each in decided(routed, inputs).values():
        torch.testing.assert_close(each.gates_NE.double(), reference(each, 3), rtol=1e-4, atol=1e-5)
        assert (each.gates_NE > 0).sum(1).max() == 3


def test_temperature_and_unit_inputs(routed_over, batch) -> None:
    routed = routed_over("llama", preset("arrow", normalise=Softmax(temperature=0.3)))
    for each in decided(routed, batch("llama")).values():
        torch.testing.assert_close(each.gates_NE.double(), reference(each, 3, 0.3), rtol=1e-4, atol=1e-5)
    routed.attached.detach()
    routed = routed_over("llama", preset("arrow", gate=ProtoGate(unit_input=True), normalise=Softmax(temperature=0.1)))
    for each in decided(routed, batch("llama")).values():
        unit = each._replace(x_ND=each.x_ND / each.x_ND.norm(dim=1, keepdim=True))
        torch.testing.assert_close(each.gates_NE.double(), reference(unit, 3, 0.1), rtol=1e-4, atol=1e-5)


def test_mixed_parameters_are_another_function(routed_over, batch) -> None:
    logits = {}
    for combine in ("outputs", "parameters"):
        routed = routed_over("llama", preset("arrow", combine=combine))
        with torch.no_grad():
            logits[combine] = routed(**batch("llama")).logits
        routed.attached.detach()
    assert (logits["outputs"] - logits["parameters"]).abs().max() > 0.01
    assert preset("arrow_mttl").to_json()["combine"] == "parameters"


def test_parameters_are_mixed_token_by_token(routed_over) -> None:
    """``(Σ g √s B)(Σ g √s A) x`` for one target, against a loop over tokens."""
    routed = routed_over("llama", preset("arrow_mttl"))
    target = "model.layers.0.mlp.up_proj"
    layer, gate = routed.attached.layers[target], routed.router.site(routed.router.site_of[target])
    x = torch.randn(2, 3, 32)
    routing = gate(Seen(x, None, None, layer.stack, RoutingContext(), False))
    got = mixture_lora(x, layer.stack, routing.gates, routing.expert_ids, combine="parameters")
    for row, token in ((0, 0), (1, 2)):
        a, b = torch.zeros(8, 32), torch.zeros(8, layer.out_features)
        for gate_value, expert in zip(routing.gates[row, token], routing.expert_ids[row, token], strict=True):
            a_rD, b_rO = layer.stack.factors(int(expert))
            root = layer.stack.scaling_E[expert].sqrt()
            a[: len(a_rD)] += gate_value * root * a_rD
            b[: len(b_rO)] += gate_value * root * b_rO
        torch.testing.assert_close(got[row, token], x[row, token] @ a.T @ b, rtol=1e-4, atol=1e-5)


def test_prototypes_are_saved_not_trained(routed_over) -> None:
    routed = routed_over("llama", preset("arrow"))
    assert not routed.trained_parameters()
    assert all(key.endswith(("prototypes_EPD", "filled_E")) for key in routed.router.state_dict())
