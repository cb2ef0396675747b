"""Feed-forward parts as experts: against a loop over experts, on every form, in and out of a model."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.builder import build
from compose.routers.ffn import FfnExperts, _WithResidual, mix_experts, pairs_of
from compose.routers.ffn_forms import FfnParts
from compose.routers.presets.mixlora_ffn import with_attention
from compose.routers.presets.registry import preset
from compose.routers.routing import Routing
from compose.routers.saved import load, save
from compose.routers.saved_file import read_mixture
from compose.routers.selectors.every import All
from compose.routers.selectors.top_k import TopK
from compose.routers.target_patterns import FEED_FORWARD

RANKS = (3, 0, 2, 1)
ARCHITECTURES = ("llama", "gpt2", "t5", "bert")


class _Linear(SimpleNamespace):
    """A base layer with factors, as an attached model has them."""


def layer(width, out, ranks=RANKS, *, bias=True):
    base = nn.Linear(width, out, bias=bias).double().requires_grad_(False)
    stack = LoraStack(
        torch.randn(sum(ranks), width, dtype=torch.float64, requires_grad=True),
        torch.randn(sum(ranks), out, dtype=torch.float64, requires_grad=True),
        torch.tensor([0.5, 1.0, 2.0, 1.5]),
        ranks,
    )
    return _Linear(base_layer=base, stack=stack, weight=base.weight)


def parts_of(*, gated, plain_up=False):
    torch.manual_seed(1)
    up = nn.Linear(5, 7).double().requires_grad_(False) if plain_up else layer(5, 7)
    gate = layer(5, 7, bias=False) if gated else None
    return FfnParts(gate, up, nn.functional.silu, nn.Identity(), layer(7, 6), nn.Identity())


def linear_of(linear, x, expert):
    if not hasattr(linear, "stack"):
        return linear(x)
    a, b = linear.stack.factors(expert)
    return linear.base_layer(x) + linear.stack.scaling_E[expert].double() * (x @ a.T @ b)


def one_expert(parts, x, expert):
    z = linear_of(parts.up, x, expert)
    z = parts.act(z) if parts.gate is None else parts.act(linear_of(parts.gate, x, expert)) * z
    return linear_of(parts.down, z, expert)


def naive(parts, x, routing):
    gates = routing.dense().double()
    return sum(gates[..., expert, None] * one_expert(parts, x, expert) for expert in range(len(RANKS)))


def leaves(parts, x, routing):
    stacks = [linear.stack for linear in (parts.gate, parts.up, parts.down) if hasattr(linear, "stack")]
    return [x, routing.gates, *(factor for stack in stacks for factor in (stack.a_RD, stack.b_RO))]


def top_2(lead, *, total=1.0):
    gates = torch.rand(*lead, 2, dtype=torch.float64)
    gates = (total * gates / gates.sum(-1, keepdim=True)).requires_grad_()
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(lead.numel())]).reshape(*lead, 2)
    wide = torch.zeros(*lead, 4)
    return Routing(gates, ids, wide, wide)


def soft(lead):
    gates = torch.rand(*lead, 4, dtype=torch.float64)
    gates[..., 1] = 0
    return Routing(gates.requires_grad_(), None, gates.detach(), gates.detach())


CASES = {
    "top_2": lambda: top_2(torch.Size((2, 3))),
    "top_2_of_rows": lambda: top_2(torch.Size((2,))),
    "sum_not_one": lambda: top_2(torch.Size((2, 3)), total=0.7),
    "soft": lambda: soft(torch.Size((2, 3))),
    "static": lambda: soft(torch.Size(())),
}


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_of_a_loop_over_experts(case, gated) -> None:
    torch.manual_seed(0)
    routing, parts = CASES[case](), parts_of(gated=gated, plain_up=case == "soft")
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    wide = routing
    if routing.logits.dim() == 2:
        wide = Routing(
            routing.gates[:, None], routing.expert_ids[:, None], routing.logits[:, None], routing.probs[:, None]
        )
    got, wanted = mix_experts(x, parts, routing), naive(parts, x, wide)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), leaves(parts, x, routing))
    theirs = torch.autograd.grad((wanted * weights).sum(), leaves(parts, x, routing))
    kept = (routing.gates != 0).to(x.dtype)  # a pair whose gate is 0 is not computed, so its gate has no gradient
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other * kept if other.shape == kept.shape else other)


def test_pairs_are_those_that_are_routed() -> None:
    pairs = pairs_of(soft(torch.Size((2, 3))), torch.Size((2, 3)))
    assert pairs.token_M.tolist() == [token for token in range(6) for _ in range(3)]
    assert pairs.expert_M.tolist() == [0, 2, 3] * 6
    chosen = pairs_of(top_2(torch.Size((4,))), torch.Size((4,)))
    assert (chosen.per_token, len(chosen.token_M)) == (2, 8)


def routed_ffn(model, make_experts, spec=None, **options):
    bank = make_experts(model)
    adapters = [
        Adapter(name, "tiny", {key: value for key, value in bank[name].targets.items() if _feeds(key)})
        for name in bank.names
    ]
    spec = preset("mixlora_ffn", **options) if spec is None else spec
    return build(attach(model, Bank.from_adapters(adapters), trainable=spec.trains_experts), spec)


def _feeds(target):
    return re.search(FEED_FORWARD, target) is not None


def logits(model, inputs):
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :6]
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_expert_alone_is_the_attached_adapter(name, tiny_model, make_experts, batch) -> None:
    """With one expert at full strength the part is the part with that adapter on its linear layers."""
    model = tiny_model(name)
    routed = routed_ffn(model, make_experts, select=TopK(k=1), train="none", losses=())
    with torch.no_grad():
        for gate in routed.router.gates.values():
            gate.gate.weight_ED.zero_()  # equal scores: the first expert
    mixed = logits(routed, batch(name))
    with routed.attached.using("expert-0"):
        alone = logits(model, batch(name))
    torch.testing.assert_close(mixed, alone)
    with routed.disable():
        assert (logits(model, batch(name)) - mixed).abs().max() > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_very_modules_come_back(name, tiny_model, make_experts, batch) -> None:
    model = tiny_model(name)
    before, bare = dict(model.named_modules()), logits(model, batch(name))
    routed = routed_ffn(model, make_experts)
    names = dict(model.named_modules())
    assert {name for name in names if "base_layer" not in name} == set(before)  # no path changes
    assert any(isinstance(module, FfnExperts | _WithResidual) for module in names.values())
    with routed.disable():
        torch.testing.assert_close(logits(model, batch(name)), bare, rtol=0, atol=0)
    routed.remove()
    routed.attached.detach()
    assert dict(model.named_modules()) == before
    torch.testing.assert_close(logits(model, batch(name)), bare, rtol=0, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_and_gates_train(name, tiny_model, make_experts, batch) -> None:
    model = tiny_model(name)
    routed = routed_ffn(model, make_experts).train()
    inputs = batch(name) if name != "bert" else {**batch("llama"), "labels": torch.tensor([0, 1, 2])}
    routed(**inputs).loss.backward()
    assert routed.last_losses.keys() == {"mixtral_lb"}
    trained = routed.trained_parameters()
    assert any(key.startswith("router.") for key in trained)
    assert any(key.endswith("a_RD") for key in trained)
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all()
    assert all(parameter.grad is None for key, parameter in routed.named_parameters() if key not in trained)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("select", [TopK(k=2), All()], ids=["top_2", "soft"])
def test_a_cache_changes_nothing(name, select, tiny_model, make_experts) -> None:
    routed = routed_ffn(tiny_model(name), make_experts, select=select)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    for options in ({}, {"num_beams": 3}):
        cached = routed.generate(prompts, max_new_tokens=8, stop_ids=[1], **options)
        assert cached == routed.generate(prompts, max_new_tokens=8, stop_ids=[1], use_cache=False, **options)


def test_checkpointing_changes_no_gradient(tiny_model, make_experts, batch) -> None:
    grads = []
    for checkpointed in (False, True):
        routed = routed_ffn(tiny_model("llama"), make_experts).train()
        if checkpointed:
            routed.gradient_checkpointing_enable()
        routed(**batch("llama")).loss.backward()
        grads.append({key: parameter.grad for key, parameter in routed.trained_parameters().items()})
        routed.attached.detach()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key])


def test_padding_takes_no_part_in_the_balance(tiny_model, make_experts, batch) -> None:
    routed = routed_ffn(tiny_model("llama"), make_experts)
    values = []
    for fill in (5, 50):
        inputs = batch("llama")
        inputs["input_ids"][inputs["attention_mask"] == 0] = fill
        routed(**inputs)
        values.append(routed.last_losses["mixtral_lb"])
    assert torch.equal(*values)


def test_attention_has_one_adapter_outside_the_gates(tiny_model, batch) -> None:
    model = tiny_model("llama")
    bank = Bank.from_adapters(with_attention(model, num_experts=3, rank=2, alpha=4.0))
    assert list(bank.names) == ["expert_0", "expert_1", "expert_2", "attention"]
    attached = attach(model, bank, trainable=True)
    routed = build(attached, preset("mixlora_ffn", targets="", always_on=("attention",)))
    before = logits(routed, batch("llama"))
    layer = attached.layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        layer.b_RO.add_(1.0)
    mixed = logits(routed, batch("llama"))
    assert (mixed - before).abs().max() > 1e-3
    with attached.using("attention"):  # the experts' B are still 0
        torch.testing.assert_close(logits(model, batch("llama")), mixed)
    routed.train()(**batch("llama")).loss.backward()
    assert layer.b_RO.grad.abs().sum() > 0


def test_wrong_banks_are_refused(tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    attached = attach(model, make_experts(model), trainable=True)
    modules = dict(model.named_modules())
    with pytest.raises(IncompatibleError, match="some have factors on attention"):
        build(attached, preset("mixlora_ffn", targets=""))
    with pytest.raises(IncompatibleError, match="one more whole feed-forward part"):
        build(attached, preset("mixlora_ffn", always_on=("expert-0",)))
    with pytest.raises(IncompatibleError, match="site 'block_part'"):
        preset("mixlora_ffn", site="linear")
    assert dict(model.named_modules()) == modules


def test_other_parts_are_refused(tiny_model, make_experts) -> None:
    class Doubled(type(tiny_model("llama").model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("llama")
    model.model.layers[1].mlp.__class__ = Doubled
    with pytest.raises(IncompatibleError, match="Doubled computes something else"):
        routed_ffn(model, make_experts)
    other = tiny_model("llama")
    other.model.layers[1].mlp.norm = nn.LayerNorm(32)
    with pytest.raises(IncompatibleError, match="is no feed-forward part"):
        routed_ffn(other, make_experts)


def test_saved_and_loaded(tiny_model, make_experts, batch, tmp_path) -> None:
    routed = routed_ffn(tiny_model("llama"), make_experts).train()
    optimizer = torch.optim.Adam(routed.trained_parameters().values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        routed(**batch("llama")).loss.backward()
        optimizer.step()
    wanted = logits(routed.eval(), batch("llama"))
    save(routed, tmp_path / "mixture")
    experts = read_mixture(tmp_path / "mixture").adapters()
    loaded = load(attach(tiny_model("llama"), Bank.from_adapters(experts), trainable=True), tmp_path / "mixture")
    torch.testing.assert_close(logits(loaded.eval(), batch("llama")), wanted, rtol=0, atol=0)
