"""A decoder's gates decide on the prompt its own encoder states were made from, never on one read before."""

from __future__ import annotations

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.gates.linear import LinearGate
from compose.routers.presets.registry import preset
from compose.routers.spec import MixtureSpec

NORMAL = LinearGate(init="normal", std=1.0)
BEFORE = {"site": "model", "scope": "sequence", "gate": NORMAL}
KINDS = {
    "first pass": MixtureSpec(gate_input="first_pass", pooling="mean", **BEFORE),
    "tap": MixtureSpec(gate_input="tap", tap=r"\.q$", pooling="last", **BEFORE),
    "logo": preset("logo"),
}
DECODER = torch.tensor([[0, 5, 6], [0, 7, 8], [0, 9, 4]])


def encoded(routed, inputs):
    named = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return routed.model.encoder(**named)


@torch.no_grad()
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_states_of_the_router_s_own_encoder(spec, routed_over, batch):
    routed, inputs = routed_over("t5", spec).eval(), batch("t5")
    mask = inputs["attention_mask"]
    want = routed(input_ids=inputs["input_ids"], attention_mask=mask, decoder_input_ids=DECODER).logits
    states = encoded(routed, inputs)
    found = routed(encoder_outputs=states, attention_mask=mask, decoder_input_ids=DECODER).logits
    torch.testing.assert_close(found, want)
    wide, long, decoder = (each.repeat_interleave(2, dim=0) for each in (states[0], mask, DECODER))
    found = routed(encoder_outputs=(wide,), attention_mask=long, decoder_input_ids=decoder).logits
    torch.testing.assert_close(found, want.repeat_interleave(2, dim=0))
    with torch.no_grad():
        encoded(routed, {**inputs, "input_ids": inputs["input_ids"].flip(1)})  # another prompt is read
    found = routed(encoder_outputs=states, attention_mask=mask, decoder_input_ids=DECODER).logits
    torch.testing.assert_close(found, want)
    some = [2, 0]
    found = routed(encoder_outputs=(states[0][some],), attention_mask=mask[some], decoder_input_ids=DECODER[some])
    torch.testing.assert_close(found.logits, want[some])


@torch.no_grad()
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_a_hook_may_change_what_the_encoder_made(spec, routed_over, batch):
    routed, inputs = routed_over("t5", spec).eval(), batch("t5")
    named = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    gates = []
    for changes in (False, True):
        if changes:
            routed.model.encoder.register_forward_hook(lambda _, args, out: type(out)(out[0] * 1.01))
        with routed.recording() as decisions:
            routed(**named, decoder_input_ids=DECODER)
        gates.append([each.gates_NE for each in decisions])
    if spec.tap:  # else the hook changes what the base model makes too
        torch.testing.assert_close(*gates)
    with pytest.raises(IncompatibleError, match="give input_ids"):
        routed(encoder_outputs=encoded(routed, inputs), decoder_input_ids=DECODER)


@torch.no_grad()
@pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)
def test_states_that_were_made_without_the_router(spec, routed_over, batch):
    routed, inputs = routed_over("t5", spec).eval(), batch("t5")
    mask = inputs["attention_mask"]
    with routed.disable():
        states = encoded(routed, inputs)
    other = {"input_ids": inputs["input_ids"].flip(1), "attention_mask": mask, "decoder_input_ids": DECODER}

    def found():
        return routed(encoder_outputs=states, attention_mask=mask, decoder_input_ids=DECODER).logits

    if spec.tap:
        for _ in range(2):  # also after another prompt was read
            with pytest.raises(IncompatibleError, match="give input_ids"):
                found()
            routed(**other)
        return
    want = found()
    routed(**other)
    torch.testing.assert_close(found(), want, rtol=0, atol=0)
