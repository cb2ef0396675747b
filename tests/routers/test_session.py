"""What a session keeps between calls, and where it looks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from compose.errors import IncompatibleError
from compose.routers import preset
from compose.routers.gates.linear import LinearGate
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
