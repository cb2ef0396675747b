"""A routed model where models run: caches, beams, padding, checkpointing, bf16, torch.compile, modes."""

from dataclasses import replace

import pytest
import torch

from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.routers.builder import build
from compose.routers.gates.linear import LinearGate
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

NORMAL = LinearGate(init="normal", std=1.0)
SPECS = {
    "token": MixtureSpec(gate=NORMAL),
    "sparse": MixtureSpec(gate=NORMAL, select=TopK(k=2), renormalise="sum"),
    "block": MixtureSpec(gate=NORMAL, site="block", gate_input="block"),
    "group": MixtureSpec(gate=NORMAL, site="group"),
    "first_pass": MixtureSpec(gate=NORMAL, site="model", gate_input="first_pass"),
    "sequence": MixtureSpec(gate=NORMAL, site="block", scope="sequence", gate_input="block", pooling="mean"),
    "sequence_first_pass": MixtureSpec(
        gate=NORMAL, site="model", scope="sequence", gate_input="first_pass", pooling="mean"
    ),
}
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.mark.parametrize("spec", [SPECS["token"], SPECS["sequence"]], ids=["token", "sequence"])
def test_a_static_cache_sees_the_padding_of_its_wide_mask(spec, routed_over) -> None:
    routed = routed_over("llama", spec)
    options = {"max_new_tokens": 5, "stop_ids": [1]}
    static = routed.generate(PROMPTS, cache_implementation="static", disable_compile=True, **options)
    assert static == routed.generate(PROMPTS, **options)


@pytest.mark.parametrize(
    ("name", "spec"),
    [*((name, key) for name in ("llama", "t5") for key in SPECS), ("gpt2", "token"), ("gpt2", "sequence_first_pass")],
)
def test_cache_beams_and_batches_change_nothing(name, spec, routed_over) -> None:
    routed = routed_over(name, SPECS[spec])
    options = {"max_new_tokens": 5, "stop_ids": [1]}
    cached = routed.generate(PROMPTS, **options)
    assert cached == routed.generate(PROMPTS, use_cache=False, **options)
    assert cached == [routed.generate([prompt], **options)[0] for prompt in PROMPTS]
    beams = routed.generate(PROMPTS, num_beams=3, num_return_sequences=2, **options)
    assert beams == routed.generate(PROMPTS, num_beams=3, num_return_sequences=2, use_cache=False, **options)


@every_spec
def test_every_step_with_a_cache_gives_the_logits_without(spec, routed_over) -> None:
    routed = routed_over("llama", spec)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]])
    prompt = torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad(), routed.told(prompt_mask=prompt):
        whole = routed.model(ids, use_cache=False).logits
        step = routed.model(ids[:, :4], use_cache=True)
        torch.testing.assert_close(step.logits, whole[:, :4], rtol=0, atol=1e-5)
        for place in range(4, 8):
            step = routed.model(ids[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
            torch.testing.assert_close(step.logits[:, 0], whole[:, place], rtol=0, atol=1e-5)


def test_sampling_with_a_seed_is_the_same_with_and_without_a_cache(routed_over) -> None:
    routed = routed_over("llama", SPECS["first_pass"])
    rows = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        rows.append(routed.generate(PROMPTS, max_new_tokens=6, stop_ids=[1], do_sample=True, use_cache=use_cache))
    assert rows[0] == rows[1]


def test_two_passes_refuse_a_cache_of_fixed_size(routed_over) -> None:
    routed = routed_over("llama", SPECS["first_pass"])
    with pytest.raises(IncompatibleError, match="dynamic cache"):
        routed.generate(PROMPTS, max_new_tokens=3, stop_ids=[1], cache_implementation="static")


@every_spec
def test_generate_leaves_mode_and_gradients_alone(spec, routed_over) -> None:
    routed = routed_over("llama", spec).train()
    before = {name: parameter.requires_grad for name, parameter in routed.named_parameters()}
    routed.generate(PROMPTS, max_new_tokens=2, stop_ids=[1])
    assert routed.training
    assert all(module.training for module in routed.modules())
    assert {name: parameter.requires_grad for name, parameter in routed.named_parameters()} == before


@every_spec
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trained"])
def test_checkpointing_changes_no_gradient(spec, trainable, tiny_model, make_experts, batch, monkeypatch) -> None:
    """Against the steps, which checkpointed layers take; `test_session` shows that fused ones give the same."""
    monkeypatch.setattr("compose.routers.session.runs_again", lambda: True)
    spec = replace(spec, train="both" if trainable else "router")
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        routed = build(attach(model, make_experts(model), trainable=trainable), spec).train()
        if checkpointing:
            routed.gradient_checkpointing_enable()
        output = routed(**batch("llama"))
        output.loss.backward()
        grads.append({name: parameter.grad for name, parameter in routed.trained_parameters().items()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@every_spec
def test_a_bf16_model_keeps_float32_gates(spec, tiny_model, make_experts, batch) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    routed = build(attach(model, make_experts(model)), spec).to(torch.bfloat16).train()
    assert {parameter.dtype for parameter in routed.router.parameters()} == {torch.float32}
    with routed.recording() as decisions:
        output = routed(**batch("llama"))
    assert {each.gates_NE.dtype for each in decisions} == {torch.float32}
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in routed.trained_parameters().values())


@pytest.mark.parametrize("spec", [spec for key, spec in SPECS.items() if key != "sparse"])
def test_autocast(spec, routed_over, batch) -> None:
    routed = routed_over(
        "llama", replace(spec, gate=LinearGate(init="normal", std=0.05))
    )  # sharp gates amplify rounding
    with torch.no_grad():
        wanted = routed(**batch("llama")).logits
        with torch.autocast("cpu", dtype=torch.bfloat16), routed.recording() as decisions:
            mixed = routed(**batch("llama")).logits
    assert {each.gates_NE.dtype for each in decisions} == {torch.float32}
    assert (mixed.float() - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own look at tensors
@pytest.mark.parametrize("key", ["token", "sparse", "first_pass", "sequence"])
def test_torch_compile(key, routed_over, batch) -> None:
    routed = routed_over("llama", SPECS[key], layers=2)
    inputs = {name: value for name, value in batch("llama").items() if name != "labels"}
    wanted = routed(**inputs).logits
    compiled = torch.compile(routed, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    loss = compiled(**batch("llama")).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in routed.trained_parameters().values())


def test_switched_off_and_on(routed_over, batch) -> None:
    routed = routed_over("llama", SPECS["token"])
    inputs = batch("llama")
    with torch.no_grad():
        mixed = routed(**inputs).logits
        with routed.disable():
            bare = routed.model(**inputs).logits
            assert not torch.equal(routed(**inputs).logits, bare)  # calling the routed model is asking for its router
        assert torch.equal(routed.model(**inputs).logits, mixed)
        routed.attached.set(None)
        assert torch.equal(routed.model(**inputs).logits, bare)
        routed.enable()
        assert torch.equal(routed.model(**inputs).logits, mixed)
    routed.remove()
    with pytest.raises(IncompatibleError, match="removed"):
        routed.enable()


def test_a_prompt_in_chunks_is_refused_where_gates_read_it_whole(routed_over) -> None:
    routed = routed_over("llama", SPECS["sequence"])
    with pytest.raises(IncompatibleError, match="prefill_chunk_size"):
        routed.generate(PROMPTS, max_new_tokens=2, stop_ids=[1], prefill_chunk_size=2)
