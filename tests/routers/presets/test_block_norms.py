"""SpectR, SMILE and LoGo: gates by their formulas; LoGo decides once, on the prompt alone."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.expert_outputs import expert_outputs
from compose.routers.gates.output_entropy import OutputEntropyGate
from compose.routers.presets.registry import preset
from compose.routers.selectors.top_k import TopK


def decided(routed, inputs, *, keep=True):
    with torch.no_grad(), routed.recording(inputs=keep) as decisions:
        routed(**inputs)
    return decisions


def norms(each):
    """``|B_e A_e x|`` and ``|V_e^T x|`` in float64."""
    x = each.x_ND.double()
    outputs, inside = [], []
    for expert in range(each.stack.num_adapters):
        a, b = (factor.double() for factor in each.stack.factors(expert))
        outputs.append((x @ a.T @ b).norm(dim=-1))
        inside.append((torch.linalg.pinv(a) @ (a @ x.T)).norm(dim=0) if len(a) else torch.zeros(len(x)).double())
    return torch.stack(outputs, 1), torch.stack(inside, 1)


@pytest.mark.parametrize("skip", ["", "layers.0"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_spectr(name, skip, routed_over, batch) -> None:
    routed = routed_over(name, preset("spectr"), skip=skip)
    for each in decided(routed, batch(name)):
        scores = norms(each)[0].masked_fill(~each.available_E, float("-inf"))
        kept = torch.zeros_like(scores).scatter(1, scores.topk(3).indices, 1.0).bool()
        wanted = torch.softmax(scores.masked_fill(~kept, float("-inf")), -1)
        torch.testing.assert_close(each.gates_NE.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_smile(k, routed_over, batch) -> None:
    routed = routed_over("llama", preset("smile", select=TopK(k=k)))
    for each in decided(routed, batch("llama")):
        probs = torch.softmax(norms(each)[1], -1)
        top = probs.topk(k)
        wanted = torch.zeros_like(probs).scatter(1, top.indices, top.values / top.values.sum(1, keepdim=True))
        torch.testing.assert_close(each.gates_NE.double(), wanted, rtol=1e-4, atol=1e-5)


TAPS = {
    "llama": "model.layers.2.self_attn.q_proj",
    "t5": "encoder.block.1.layer.0.SelfAttention.q",
    "gpt2": "transformer.h.1.attn.c_attn",
}


def last_prompt_tokens(routed, name, inputs):
    """What the tapped target reads at the last prompt token, in the bare base model."""
    read = []
    hook = routed.attached.layers[TAPS[name]].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad(), routed.disable():
        routed.model(**inputs)
    hook.remove()
    last = inputs["attention_mask"].sum(1) - 1 if name == "t5" else torch.full((len(read[0]),), 4)
    return read[0][torch.arange(len(last)), last]


@pytest.mark.parametrize("name", TAPS)
def test_logo(name, routed_over, batch) -> None:
    inputs = batch(name)
    for gate in ("norm", "entropy"):
        options = {} if gate == "norm" else {"gate": OutputEntropyGate()}
        routed = routed_over(name, preset("logo", select=TopK(k=3), **options))
        h = last_prompt_tokens(routed, name, inputs)
        outputs = expert_outputs(h.double(), routed.attached.layers[TAPS[name]].stack)
        probs = torch.softmax(outputs, -1)
        scores = outputs.norm(dim=-1) if gate == "norm" else 1 / (-(probs * probs.log()).sum(-1) + 1e-6)
        top = scores.topk(3)
        wanted = torch.zeros_like(scores).scatter(1, top.indices, top.values / top.values.sum(1, keepdim=True))
        decisions = decided(routed, inputs, keep=False)
        assert len(decisions) == (2 if name == "t5" else 1)  # encoder and decoder share one decision
        for each in decisions:
            torch.testing.assert_close(each.gates_NE.double(), wanted, rtol=1e-4, atol=1e-5)
        routed.attached.detach()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_logo_never_reads_the_response(name, routed_over, batch) -> None:
    routed, inputs = routed_over(name, preset("logo")), batch(name)
    (first, *_) = decided(routed, inputs, keep=False)
    changed = {**inputs, "labels": inputs["labels"].clone(), "input_ids": inputs["input_ids"].clone()}
    if name == "t5":
        changed["labels"][:, -3:] = 5
    else:
        changed["input_ids"][:, 5:] = 5
    assert torch.equal(decided(routed, changed, keep=False)[0].gates_NE, first.gates_NE)
    changed["input_ids"][:, 0] = 5
    assert not torch.equal(decided(routed, changed, keep=False)[0].gates_NE, first.gates_NE)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_logo_probes_once_per_generation(name, routed_over) -> None:
    routed = routed_over(name, preset("logo"))
    calls = []
    hook = routed.attached.layers[TAPS[name]].base_layer.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": 6, "stop_ids": []}
    routed.generate([[5, 6, 7], [8, 9]], **options)
    hook.remove()
    assert len(calls) == (
        2 if name == "t5" else 1 + 6
    )  # one pass of the base; then the prompt and 5 tokens, or the encoder
    with routed.recording() as decisions:
        routed.generate([[5, 6, 7], [8, 9]], **options)
    together = decisions[0].gates_NE
    for row, prompt in enumerate([[5, 6, 7], [8, 9]]):
        with routed.recording() as decisions:
            routed.generate([prompt], **options)
        torch.testing.assert_close(
            decisions[0].gates_NE[0], together[row], rtol=1e-4, atol=1e-5
        )  # padding is not read


def test_a_missing_expert_at_the_tap_gets_nothing(routed_over, batch) -> None:
    routed = routed_over("llama", preset("logo"), skip="layers.2.self_attn.q_proj")
    (each,) = decided(routed, batch("llama"), keep=False)
    assert each.gates_NE[:, 1].max() < 1e-15
    torch.testing.assert_close(each.gates_NE.sum(1), torch.ones(3))


def test_another_tap_and_wrong_ones(routed_over, batch) -> None:
    gates = []
    for tap in ("layers.0.mlp.up_proj", "layers.1.self_attn.v_proj"):
        routed = routed_over("llama", preset("logo", tap=tap))
        gates.append(decided(routed, batch("llama"), keep=False)[0].gates_NE)
        routed.attached.detach()
    assert not torch.equal(*gates)
    for options in ({"tap": ""}, {"scope": "token", "pooling": "none"}, {"site": "linear"}, {"tap": "("}):
        with pytest.raises(IncompatibleError, match="tap"):
            preset("logo", **options)
    with pytest.raises(IncompatibleError, match="matches none"):
        routed_over("llama", preset("logo", tap="no_such_layer"))
