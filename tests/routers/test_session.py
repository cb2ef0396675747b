"""What a session keeps between calls, and where it looks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from compose.errors import IncompatibleError
from compose.routers import preset, soft
from compose.routers.gates.linear import LinearGate
from compose.routers.mixing import Rows
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


def test_labels_that_do_not_fit_leave_no_decisions_behind(routed_over, batch):
    routed, inputs = routed_over("llama", preset("mixlora_lin")), batch("llama")
    want = routed(**inputs).loss
    with pytest.raises(IncompatibleError, match="2 rows, the batch 3"):
        routed(**inputs, expert_labels=torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(routed(**inputs).loss, want)


@torch.no_grad()
def test_embeddings_are_read_before_the_first_block_whatever_is_routed(routed_over, batch):
    spec = replace(preset("octavius"), targets=r"layers\.[12]\.", site="block")
    routed, ids = routed_over("llama", spec), batch("llama")["input_ids"]
    seen = []
    hook = routed.router.site("model.layers.1").gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].x))
    routed(input_ids=ids)
    hook.remove()
    embedded = routed.model.get_input_embeddings()(ids)
    torch.testing.assert_close(seen[0], embedded.mean(1))


def _of_prompts(routed_over, which):
    spec = {
        "layer": MixtureSpec(gate=LinearGate(init="normal", std=2.0), scope="sequence", pooling="mean"),
        "base pass": MixtureSpec(
            gate=LinearGate(init="normal", std=2.0),
            site="model",
            scope="sequence",
            gate_input="first_pass",
            pooling="mean",
        ),
    }[which]
    return routed_over("llama", spec)


@torch.no_grad()
@pytest.mark.parametrize("which", ["layer", "base pass"])
@pytest.mark.parametrize("given", [False, True], ids=["made by the model", "given"])
def test_a_prompt_s_gates_go_with_its_cache(routed_over, batch, which, given):
    routed, ids = _of_prompts(routed_over, which), batch("llama")["input_ids"]
    first, second = ids[:, :5], ids.flip(0)[:, :5]
    caches = [DynamicCache(config=routed.config) if given else None for _ in range(2)]
    one = routed(input_ids=first, past_key_values=caches[0], use_cache=True).past_key_values
    again = copy.deepcopy(one)
    want = routed(input_ids=ids[:, 5:], past_key_values=one).logits
    routed(input_ids=second, past_key_values=caches[1], use_cache=True)
    torch.testing.assert_close(routed(input_ids=ids[:, 5:], past_key_values=again).logits, want)


@torch.no_grad()
@pytest.mark.parametrize("which", ["layer", "base pass"])
def test_a_prompt_that_was_read_without_the_router_is_refused(routed_over, batch, which):
    routed, ids = _of_prompts(routed_over, which), batch("llama")["input_ids"]
    routed(input_ids=ids, use_cache=True)
    with routed.disable():
        cache = routed.model(input_ids=ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(IncompatibleError, match="not in force when the prompt in the cache was read; start without"):
        routed(input_ids=ids[:, 5:], past_key_values=cache)


@torch.no_grad()
def test_labels_of_the_decoder_s_tokens_are_not_those_of_the_encoder_s_it_attends_to(routed_over, batch):
    routed, inputs = routed_over("t5", MixtureSpec(gate=LinearGate(init="normal"))), batch("t5")
    inputs["labels"] = inputs["input_ids"].clone()  # as many tokens on both sides
    labels = torch.zeros(3, 9, dtype=torch.int64)
    labels[:, 4:] = 1
    with routed.recording() as decisions:
        routed(**inputs, expert_labels=labels)
    found = {each.site: each.labels_N.unflatten(0, (3, 9)) for each in decisions}
    (cross,) = [name for name in found if name.endswith("decoder.block.0.layer.1.EncDecAttention.k")]
    torch.testing.assert_close(found[cross], torch.full((3, 9), -1))
    torch.testing.assert_close(found[cross.replace("EncDecAttention.k", "EncDecAttention.q")], labels)


NORMAL = LinearGate(init="normal", std=1.0)
QUICK = {
    "token": MixtureSpec(gate=NORMAL, train="both"),
    "top 2": MixtureSpec(gate=NORMAL, select=TopK(k=2), renormalise="sum"),
    "group": MixtureSpec(gate=NORMAL, site="group", train="both"),
    "block": MixtureSpec(gate=NORMAL, site="block", gate_input="block"),
    "first pass": MixtureSpec(gate=NORMAL, site="model", gate_input="first_pass"),
    "first pass, per target": MixtureSpec(gate=NORMAL, gate_input="first_pass"),
    "sequence": MixtureSpec(gate=NORMAL, site="block", scope="sequence", gate_input="block", pooling="mean"),
}


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (3, 1, 8, 5)], ids=str)
@pytest.mark.parametrize("spec", QUICK.values(), ids=QUICK)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_fast_path_gives_the_loss_and_the_gradients_of_the_steps(
    name, spec, ranks, routed_over, batch, monkeypatch, count_calls
):
    """As near to what float64 gives as the steps are: in float32 their sums differ in their last digits."""
    routed, inputs = routed_over(name, spec, ranks=ranks, skip="layers.1"), batch(name)
    added, gated = count_calls(Rows, "add"), count_calls(soft, "gated_lowrank")
    found = []
    for quick in (True, False, False):
        output = routed(**inputs)
        gradients = torch.autograd.grad(output.loss, list(routed.trained_parameters().values()))
        found.append([output.logits.detach(), *gradients])
        if quick:
            used = len(added), len(gated)
            monkeypatch.setattr(routed.session, "_quick", lambda x: False)
        else:
            routed.double()
    fast, slow, exact = found
    far = [max(distance(*pair) for pair in zip(each, exact, strict=True)) for each in (fast, slow)]
    assert far[0] <= 2 * far[1] < 0.01
    assert used == (len(added), len(gated))  # the second time none
    assert used[0] or used[1]
    own = spec.gate_input == "layer" and spec.scope == "token"  # targets that decide for themselves alone
    assert bool(used[1]) == own


@pytest.mark.parametrize(
    ("which", "reentrant"),
    [("token", False), ("token", True), ("group", False), ("group", True), ("first pass", False)],
)
def test_checkpointed_layers_decide_and_spread_again(which, reentrant, routed_over, batch):
    routed, inputs = routed_over("llama", QUICK[which], ranks=(2, 2, 2)).train(), batch("llama")
    trained = list(routed.trained_parameters().values())
    want = torch.autograd.grad(routed(**inputs).loss, trained)
    routed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        routed.model.enable_input_require_grads()
    routed(**inputs).loss.backward()
    for parameter, gradient in zip(trained, want, strict=True):  # the first of two forwards is one without gradients
        assert distance(parameter.grad, gradient) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_hooks_on_every_part_are_called(mode, routed_over, batch):
    routed, ids = routed_over("llama", QUICK["token"], ranks=(2, 2, 2)), batch("llama")["input_ids"]
    want = routed(input_ids=ids).logits
    target = next(iter(routed.attached.layers))
    site, layer = routed.router.site(target), routed.attached.layers[target]
    parts = [routed.router, site, site.gate, site.normalise, site.select, routed.mixer, layer, layer.base_layer]
    for part in parts:
        calls = []
        hook = part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with getattr(torch, mode)():
            torch.testing.assert_close(routed(input_ids=ids).logits, want)
        hook.remove()
        assert calls


@torch.no_grad()
def test_an_ablation_changes_what_is_spread(routed_over, batch):
    routed, ids = routed_over("llama", QUICK["first pass"], ranks=(2, 2, 2)), batch("llama")["input_ids"]
    with routed.transformed(lambda site, routing: routing._replace(gates=torch.zeros_like(routing.gates))):
        without = routed(input_ids=ids).logits
    with routed.disable():
        torch.testing.assert_close(without, routed.model(input_ids=ids).logits)


def distance(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


def test_checkpointed_layers_run_again_as_they_ran_where_decisions_were_recorded(routed_over, batch):
    """In ``backward``, when nobody records them any more."""
    routed, inputs = routed_over("llama", QUICK["token"], ranks=(2, 2, 2)).train(), batch("llama")
    trained = list(routed.trained_parameters().values())
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            routed.gradient_checkpointing_enable({"use_reentrant": False})
        with routed.recording() as decisions:
            loss = routed(**inputs).loss
        gradients.append(torch.autograd.grad(loss, trained))
        assert len(decisions) == len(routed.router.layout)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("between", ["generate", "forward", "recorded forward"])
@pytest.mark.parametrize("recorded", [True, False])
def test_other_forwards_between_a_checkpointed_one_and_its_backward_change_nothing(
    recorded, between, routed_over, batch
):
    routed, inputs = routed_over("llama", QUICK["token"], ranks=(2, 2, 2)).train(), batch("llama")
    trained = list(routed.trained_parameters().values())
    want = torch.autograd.grad(routed(**inputs).loss, trained)
    routed.gradient_checkpointing_enable({"use_reentrant": False})
    with routed.recording() if recorded else nullcontext():
        loss = routed(**inputs).loss
    if between == "generate":
        routed.generate([[5, 6, 7]], max_new_tokens=2)
    else:
        with torch.no_grad(), routed.recording() if between == "recorded forward" else nullcontext():
            routed(**inputs)
    for found, gradient in zip(torch.autograd.grad(loss, trained), want, strict=True):
        assert distance(found, gradient) < 1e-4


def test_decisions_of_a_generation_may_be_used_in_a_loss(routed_over):
    routed = routed_over("llama", QUICK["token"], ranks=(2, 2, 2))
    with routed.recording() as decisions:
        routed.generate([[5, 6, 7]], max_new_tokens=2)
    scale = torch.ones(3, requires_grad=True)
    (decisions[0].gates_NE * scale).pow(2).sum().backward()
    assert scale.grad.abs().min() > 0
