"""PHATGOOSE's gates: what trains is v alone, as a loop with one adapter and a sigmoid trains it."""

import pytest
import torch

from compose.errors import IncompatibleError, UnknownNameError
from compose.routers.phatgoose import train_phatgoose_gates
from compose.routers.presets.registry import preset


def batches_of(routed, batch, name="llama"):
    data = {}
    for number, expert in enumerate(routed.router.experts):
        inputs = batch(name)
        generator = torch.Generator().manual_seed(number)
        inputs["input_ids"] = torch.randint(3, 67, inputs["input_ids"].shape, generator=generator)
        data[expert] = [inputs]
    return data


def vectors(routed, expert):
    return {
        site.leader: routed.router.site(name).gate.prototypes_EPD[expert, 0]
        for name, site in routed.router.layout.items()
    }


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_first_step_is_that_of_a_loop_with_hooks(name, routed_over, batch) -> None:
    """One step of AdamW from v = 0, with the gated adapter written as hooks on the bare model's linear layers."""
    routed = routed_over(name, preset("phatgoose"))
    data = batches_of(routed, batch, name)
    losses = train_phatgoose_gates(routed, data, steps=1, lr=1e-3)
    assert losses.keys() == data.keys()
    for expert in (0, 2):
        wanted, loss = _reference_step(routed, expert, data[f"expert-{expert}"][0])
        assert losses[f"expert-{expert}"] == [pytest.approx(loss, rel=1e-5)]
        for target, got in vectors(routed, expert).items():
            sure = wanted[target].abs() > 1e-6  # Adam's first step is the sign of the gradient
            torch.testing.assert_close(got[sure].sign(), -wanted[target][sure].sign())
            assert got.abs().max() <= 1e-3 + 1e-9


def _reference_step(routed, expert, inputs):
    vectors, hooks = {}, []
    for target, layer in routed.attached.layers.items():
        a, b = layer.stack.factors(expert)
        scaling = float(layer.stack.scaling_E[expert])
        vector = torch.zeros(a.shape[1], requires_grad=True)

        def gated(module, args, output, a=a, b=b, scaling=scaling, vector=vector):
            gate = torch.sigmoid(args[0] @ vector)[..., None]
            return output + gate * scaling * (args[0] @ a.T @ b)

        vectors[target] = vector
        hooks.append(layer.base_layer.register_forward_hook(gated))
    with routed.disable():
        loss = routed.model(**inputs).loss
    gradients = torch.autograd.grad(loss, list(vectors.values()))
    for hook in hooks:
        hook.remove()
    return dict(zip(vectors, gradients, strict=True)), float(loss.detach())


def test_gates_learn_and_route_to_their_expert_more(routed_over, batch) -> None:
    routed = routed_over("llama", preset("phatgoose"))
    losses = train_phatgoose_gates(routed, batches_of(routed, batch), steps=30, lr=3e-2)
    assert all(each[-1] < each[0] for each in losses.values())
    with torch.no_grad():
        routed(**batch("llama"))


def test_experts_train_apart_and_nothing_else_changes(routed_over, batch) -> None:
    routed = routed_over("llama", preset("phatgoose"), trainable=True).train()
    data = batches_of(routed, batch)
    before = {name: parameter.detach().clone() for name, parameter in routed.named_parameters()}
    train_phatgoose_gates(routed, {"expert-1": data["expert-1"]}, steps=2)
    alone = vectors(routed, 1)
    alone = {target: vector.clone() for target, vector in alone.items()}
    assert all(vector.abs().sum() == 0 for vector in vectors(routed, 0).values())
    with pytest.raises(IncompatibleError, match="no prototypes yet for 3 experts"):
        routed(**batch("llama"))
    train_phatgoose_gates(routed, data, steps=2)
    assert all(torch.equal(vector, alone[target]) for target, vector in vectors(routed, 1).items())
    assert routed.training
    for name, parameter in routed.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert routed.attached.active is routed.session


def test_an_expert_trains_where_it_has_factors(routed_over, batch) -> None:
    routed = routed_over("llama", preset("phatgoose"), skip="layers.0")
    train_phatgoose_gates(routed, batches_of(routed, batch), steps=1)
    gate = routed.router.site(routed.router.site_of["model.layers.0.mlp.up_proj"]).gate
    assert gate.filled_E.tolist() == [True, False, True, True]
    with torch.no_grad():
        routed(**batch("llama"))


def test_wrong_calls_are_refused(routed_over, batch) -> None:
    routed = routed_over("llama", preset("phatgoose"))
    with pytest.raises(UnknownNameError, match="expert-9"):
        train_phatgoose_gates(routed, {"expert-9": []})
    with pytest.raises(IncompatibleError, match="no batches for expert 'expert-0'"):
        train_phatgoose_gates(routed, {"expert-0": []})
    with pytest.raises(IncompatibleError, match="steps must be at least 1"):
        train_phatgoose_gates(routed, batches_of(routed, batch), steps=0)
    routed.attached.detach()
    with pytest.raises(IncompatibleError, match="use preset 'phatgoose'"):
        train_phatgoose_gates(routed_over("llama", preset("avg_act")), {})
    with pytest.raises(IncompatibleError, match="one per target"):
        train_phatgoose_gates(routed_over("llama", preset("phatgoose", site="block")), {})
