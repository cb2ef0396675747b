"""The routed model on every architecture: gates act, train, can be switched off, and leave no trace."""

import pytest
import torch

from compose.engine.attach import attach
from compose.engine.coefficients import Coefficients
from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.gates.linear import LinearGate
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

NORMAL = LinearGate(init="normal", std=1.0)
TOKEN = MixtureSpec(gate=NORMAL)
SPARSE = MixtureSpec(gate=NORMAL, select=TopK(k=2), renormalise="sum")
SPECS = {
    "token_linear": TOKEN,
    "token_sparse": SPARSE,
    "token_block": MixtureSpec(gate=NORMAL, site="block", gate_input="block"),
    "token_part": MixtureSpec(gate=NORMAL, site="block_part"),
    "token_group": MixtureSpec(gate=NORMAL, site="group"),
    "first_pass": MixtureSpec(gate=NORMAL, site="model", gate_input="first_pass"),
    "sequence_block": MixtureSpec(gate=NORMAL, site="block", scope="sequence", gate_input="block", pooling="mean"),
    "sequence_model": MixtureSpec(
        gate=NORMAL, site="model", scope="sequence", gate_input="embeddings", pooling="mean"
    ),
    "sequence_first_pass": MixtureSpec(
        gate=NORMAL, site="model", scope="sequence", gate_input="first_pass", pooling="last"
    ),
}


def run(routed, inputs):
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if routed.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :6]
    with torch.no_grad():
        return routed(**inputs).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gates_act_and_leave_no_trace(spec, name, tiny_model, make_experts, batch) -> None:
    model = tiny_model(name)
    modules = dict(model.named_modules())
    inputs = batch(name)
    bare = run(_Bare(model), inputs)
    attached = attach(model, make_experts(model))
    routed = build(attached, spec)
    mixed = run(routed, inputs)
    assert not torch.equal(mixed, bare)
    again = run(routed, inputs)  # siblings are known by now: other last digits
    torch.testing.assert_close(again, mixed, rtol=1e-4, atol=5e-5)
    mixed = again
    with routed.disable():
        torch.testing.assert_close(run(_Bare(model), inputs), bare, rtol=0, atol=0)
    torch.testing.assert_close(run(_Bare(model), inputs), mixed, rtol=0, atol=0)  # in force outside of calls too
    attached.detach()
    assert dict(model.named_modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    torch.testing.assert_close(run(_Bare(model), inputs), bare, rtol=0, atol=0)


class _Bare:
    """A model called as a routed one."""

    def __init__(self, model) -> None:
        self.model, self.config = model, model.config

    def __call__(self, **inputs):
        return self.model(**inputs)


def test_constant_gates_equal_coefficients(tiny_model, make_experts, batch) -> None:
    model = tiny_model("llama")
    attached = attach(model, make_experts(model))
    inputs = batch("llama")
    routed = build(attached, MixtureSpec(gate=LinearGate(init="zeros")))
    uniform = run(routed, inputs)
    attached.set(Coefficients(torch.full((4,), 0.25)))
    torch.testing.assert_close(uniform, run(_Bare(model), inputs))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_router_alone_trains(spec, routed_over, batch) -> None:
    routed = routed_over("llama", spec).train()
    routed(**batch("llama")).loss.backward()
    trained = routed.trained_parameters()
    assert trained
    assert all(name.startswith("router.") for name in trained)
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.values())
    others = [parameter for name, parameter in routed.named_parameters() if name not in trained]
    assert all(parameter.grad is None for parameter in others)


def test_experts_need_a_trainable_bank(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    attached = attach(model, make_experts(model))
    with pytest.raises(IncompatibleError, match="trainable=True"):
        build(attached, MixtureSpec(train="both"))


def test_a_missing_expert_is_masked_or_zero(routed_over, batch) -> None:
    routed = routed_over("llama", TOKEN, skip="layers.0")
    with routed.recording() as decisions:
        run(routed, batch("llama"))
    first = next(each for each in decisions if each.layer == 0)
    assert first.available_E.tolist() == [True, False, True, True]
    assert first.gates_NE[:, 1].abs().max() == 0
    torch.testing.assert_close(first.gates_NE.sum(1), torch.ones(len(first.gates_NE)))
    zero = routed_over("llama", MixtureSpec(gate=NORMAL, missing="zero"), skip="layers.0")
    with zero.recording() as decisions:
        run(zero, batch("llama"))
    assert next(each for each in decisions if each.layer == 0).gates_NE[:, 1].min() > 0


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_gate_per_sequence_never_reads_the_response(name, routed_over, batch) -> None:
    for key in ("sequence_block", "sequence_model", "sequence_first_pass"):
        routed = routed_over(name, SPECS[key])
        inputs = batch(name)
        gates = _gates(routed, inputs)
        changed = {**inputs, "labels": inputs["labels"].clone()}
        if name == "t5":
            changed["labels"][:, -3:] = 5
        else:
            changed["input_ids"] = inputs["input_ids"].clone()
            changed["input_ids"][:, 6:] = 5
        assert all(torch.equal(one, two) for one, two in zip(gates, _gates(routed, changed), strict=True))
        changed["input_ids"] = inputs["input_ids"].clone()
        changed["input_ids"][:, 0] = 5
        assert not all(torch.equal(one, two) for one, two in zip(gates, _gates(routed, changed), strict=True))
        routed.attached.detach()


def _gates(routed, inputs):
    with torch.no_grad(), routed.recording() as decisions:
        routed(**inputs)
    return [each.gates_NE for each in decisions]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_cached_generation_equals_no_cache(spec, routed_over) -> None:
    routed = routed_over("llama", spec)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    cached = routed.generate(prompts, max_new_tokens=8, stop_ids=[1])
    assert cached == routed.generate(prompts, max_new_tokens=8, stop_ids=[1], use_cache=False)
    beams = routed.generate(prompts, max_new_tokens=6, stop_ids=[1], num_beams=3)
    assert beams == routed.generate(prompts, max_new_tokens=6, stop_ids=[1], num_beams=3, use_cache=False)


@torch.no_grad()
def test_what_was_said_stays_beside_what_a_call_says(routed_over, batch) -> None:
    spec = MixtureSpec(gate=NORMAL, scope="sequence", pooling="mean")
    routed, inputs = routed_over("llama", spec), batch("llama")
    known = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    prompt, tasks = torch.arange(9).expand(3, 9) < 3, torch.zeros(3, dtype=torch.int64)
    want = routed(**known, prompt_mask=prompt, task_ids=tasks).logits
    with routed.told(prompt_mask=prompt):
        torch.testing.assert_close(routed(**known, task_ids=tasks).logits, want)
        with routed.told(task_ids=tasks):
            torch.testing.assert_close(routed(**known).logits, want)


def test_a_router_that_does_not_fit_the_model_leaves_no_trace(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    attached = attach(model, make_experts(model))
    spec = MixtureSpec(gate=NORMAL, gate_input="embeddings")
    layers, model.model.layers = model.model.layers, torch.nn.Module()
    for number, layer in enumerate(layers):
        setattr(model.model.layers, str(number), layer)
    with pytest.raises(IncompatibleError, match="no list of layers"):
        build(attached, spec)
    assert all(p.requires_grad for p in model.parameters())
    assert not model._forward_hooks
    assert not model.model._forward_pre_hooks
    assert attached.active is None
