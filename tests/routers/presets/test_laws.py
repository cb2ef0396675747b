"""Laws of every registered preset on tiny random Llama, T5 and BERT; a new preset is tested by being registered.

Every preset on Llama, one of each kind on the others: see ``tests/routers/preset_kinds.py``.
"""

import json

import pytest
import torch

from compose.routers.presets.registry import PRESETS
from compose.routers.spec import MixtureSpec, reads_prompt_too
from tests.routers.preset_kinds import on_architectures, one_of_each_kind

NAMES = list(PRESETS)
SPECS = {name: PRESETS[name].spec for name in NAMES}
SAME = {"none_r4", "none_r16", "none_r32", "none_r128"}  # none_r8 at other ranks
NEEDS = {"tasks", "clusters", "text", "expert_labels", "calibration"}


def names_of(condition=lambda spec: True):
    return [name for name in NAMES if name not in SAME and condition(SPECS[name])]


def presets(condition=lambda spec: True):
    return pytest.mark.parametrize("name", names_of(condition))


def presets_on(*others, condition=lambda spec: True):
    """All on Llama, one of each kind on ``others``."""
    return pytest.mark.parametrize(("name", "architecture"), on_architectures(names_of(condition), *others))


def without_labels(routed, inputs):
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    if routed.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :6]
    return inputs


def logits_of(routed, inputs, said):
    with torch.no_grad():
        return routed(**without_labels(routed, inputs), **said).logits


def bare_logits(routed, inputs):
    with torch.no_grad(), routed.disable():
        return routed.model(**without_labels(routed, inputs)).logits


def decisions_of(routed, inputs, said):
    with torch.no_grad(), routed.recording() as decisions, routed.told(**said):
        routed.model(**inputs)
    return decisions


def train(routed, inputs, said, steps, rate=1e-2):
    optimizer = torch.optim.Adam(routed.trained_parameters().values(), lr=rate)
    routed.train()
    for _ in range(steps):
        optimizer.zero_grad()
        routed(**inputs, **said).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    routed.eval()


def shake(parameters, seed=9):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def gate_parameters(routed):
    return [parameter for name, parameter in routed.named_parameters() if name.startswith("router.")]


@pytest.mark.parametrize("name", NAMES)
def test_the_specification_survives_json(name) -> None:
    entry = PRESETS[name]
    assert entry.spec.preset == name
    assert MixtureSpec.from_json(json.loads(json.dumps(entry.spec.to_json()))) == entry.spec
    assert entry.summary
    assert set(entry.needs) <= NEEDS


@presets_on("t5", "bert")
def test_experts_and_gates_act(name, architecture, routed_preset, say, inputs_of) -> None:
    routed = routed_preset(name, architecture, awake=True)
    inputs, said = inputs_of(architecture), say(name)
    mixed = logits_of(routed, inputs, said)
    assert mixed.isfinite().all()
    assert (mixed - bare_logits(routed, inputs)).abs().max() > 1e-5
    if gate_parameters(routed):
        shake(gate_parameters(routed))
        assert (logits_of(routed, inputs, said) - mixed).abs().max() > 1e-6


@presets_on("t5", "bert", condition=lambda spec: spec.train != "none")
def test_a_preset_trains_what_it_promises(name, architecture, routed_preset, say, inputs_of) -> None:
    routed = routed_preset(name, architecture)
    inputs, said = inputs_of(architecture), say(name)

    def loss() -> float:
        with torch.no_grad():
            return float(routed(**inputs, **said).loss)

    before, bare = loss(), bare_logits(routed, inputs)
    train(routed, inputs, said, steps=6)
    assert loss() < before
    assert (logits_of(routed, inputs, said) - bare).abs().max() > 1e-5
    routed.train()(**inputs, **said).loss.backward()
    trained, spec = routed.trained_parameters(), routed.spec
    assert {key for key, value in routed.named_parameters() if value.grad is not None} == set(trained)
    sizes = {"router": 0.0, "experts": 0.0}
    for key, parameter in trained.items():
        sizes["router" if key.startswith("router.") else "experts"] += float(parameter.grad.abs().sum())
    assert (sizes["router"] > 0) == spec.trains_router
    assert (sizes["experts"] > 0) == spec.trains_experts


@presets_on("t5", "bert")
def test_padding_changes_nothing(name, architecture, routed_preset, say, inputs_of) -> None:
    routed = routed_preset(name, architecture, awake=True)
    inputs, said = inputs_of(architecture), say(name)
    padded = {key: value.clone() for key, value in inputs.items()}
    padded["input_ids"][inputs["attention_mask"] == 0] = 7
    for key, filler in (("input_ids", 9), ("attention_mask", 0), ("labels", -100)):
        if padded[key].dim() == 2:
            padded[key] = torch.nn.functional.pad(padded[key], (0, 3), value=filler)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        one, two = routed(**inputs, **said), None
        losses = dict(routed.last_losses)
        two = routed(**padded, **said)
    assert losses.keys() == routed.last_losses.keys()
    for loss, value in losses.items():
        torch.testing.assert_close(routed.last_losses[loss], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.loss, one.loss, rtol=1e-4, atol=1e-5)
    if architecture == "llama":
        torch.testing.assert_close(two.logits[:, : real.shape[1]][real], one.logits[real], rtol=1e-4, atol=1e-5)
    else:
        width = one.logits.shape[1] if architecture == "t5" else None
        torch.testing.assert_close(two.logits[:, :width], one.logits, rtol=1e-4, atol=5e-5)  # 2e-15 in float64


@presets_on("t5", "bert")
def test_every_decision_has_an_expert_and_top_k_has_k(name, architecture, routed_preset, say, inputs_of) -> None:
    routed = routed_preset(name, architecture, awake=True)
    spec = routed.spec
    for seed in (1, 2):
        shake(gate_parameters(routed), seed)
        for each in decisions_of(routed, inputs_of(architecture), say(name)):
            gates_NE = each.gates_NE[each.real_N][:, each.available_E]
            assert gates_NE.isfinite().all()
            assert (each.gates_NE[:, ~each.available_E & ~_always(routed, each.site)] == 0).all()
            active = (gates_NE != 0).sum(1)
            assert (active >= 1).all()
            available = int(each.available_E.sum())
            if (k := _chosen(routed, each.site, available)) is not None:
                assert (active == k).all(), (each.site, active)
                if spec.renormalise != "none" and spec.gate_power == 1:
                    torch.testing.assert_close(gates_NE.sum(1), torch.ones(len(gates_NE)))
                elif spec.renormalise == "none" and spec.post == "none":  # what the others had is lost
                    expected = each.probs_NE[each.real_N][:, each.available_E] ** spec.gate_power
                    torch.testing.assert_close(gates_NE, expected.masked_fill(gates_NE == 0, 0.0))


def _always(routed, site):
    return routed.router.site(site).always_E.bool()


def _chosen(routed, site, available):
    """How many experts the selector promises, None where it promises no number."""
    select = routed.spec.select
    kind = type(select).__name__
    if kind == "Argmax":
        return 1
    if kind == "HardSoftTopK":
        return min(select.k, available)
    if kind != "TopK":
        return None
    layer, depth = routed.router.layout[site].layer, _depth(routed, site)
    return min(select.per_layer[max(0, layer) * len(select.per_layer) // depth], available)


def _depth(routed, site):
    body = routed.router.layout[site].body
    return max(1, *(each.layer + 1 for each in routed.router.layout.values() if each.body == body))


@presets(lambda spec: spec.structure == "lora" and not spec.subtract_start and spec.gate is not None)
def test_mixing_parameters_and_outputs_are_different_functions(name, routed_preset, say, inputs_of) -> None:
    inputs, said = inputs_of("llama"), say(name)
    other = {"outputs": "parameters", "parameters": "outputs"}[SPECS[name].combine]
    options = {"splits": 1, "expert_grad": "plain"}
    one = logits_of(routed_preset(name, awake=True, **options), inputs, said)
    two = logits_of(routed_preset(name, awake=True, combine=other, **options), inputs, said)
    if _takes_one(SPECS[name].select) and not SPECS[name].always_on and _weighs_one(name):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)  # one expert at gate 1: no cross terms
    else:
        assert (one - two).abs().max() > 1e-5


def _takes_one(select):
    return type(select).__name__ == "Argmax" or (type(select).__name__ == "TopK" and select.per_layer == (1,))


def _weighs_one(name):
    return SPECS[name].renormalise != "none"


@presets()
def test_gates_stay_float32_in_a_bfloat16_model(name, routed_preset, say, inputs_of) -> None:
    routed = routed_preset(name, dtype=torch.bfloat16, awake=True)
    assert all(parameter.dtype == torch.float32 for parameter in gate_parameters(routed))
    assert all(buffer.dtype != torch.bfloat16 for buffer in routed.router.buffers())
    inputs, said = inputs_of("llama"), say(name)
    decisions = decisions_of(routed, inputs, said)
    assert all(each.gates_NE.dtype == each.logits_NE.dtype == torch.float32 for each in decisions)
    output = logits_of(routed, inputs, said)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    if routed.spec.train != "none":
        routed.train()(**inputs, **said).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in routed.trained_parameters().values())


@presets_on("t5", condition=lambda spec: spec.scope != "step")
def test_no_decision_on_the_prompt_reads_the_response(name, architecture, routed_preset, say, inputs_of) -> None:
    """Gates per sequence, and per token of the prompt; in an encoder-decoder model nothing but later tokens may."""
    routed = routed_preset(name, architecture, awake=True)
    inputs, said = inputs_of(architecture), say(name)
    changed = {key: value.clone() for key, value in inputs.items()}
    if architecture == "t5":
        changed["labels"][:, -3:] = 5
    else:
        changed["input_ids"][:, 6:8] = 5  # labels stay as they are, so the prompt is the same
    one, two = (decisions_of(routed, batch, said) for batch in (inputs, changed))
    for left, right in zip(one, two, strict=True):
        rows = slice(None) if len(left.gates_NE) == len(right.gates_NE) <= 3 else _before(left, architecture, inputs)
        torch.testing.assert_close(left.logits_NE[rows], right.logits_NE[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(left.gates_NE[rows], right.gates_NE[rows], rtol=1e-4, atol=1e-6)
    if (routed.spec.scope == "sequence" and routed.spec.pooling != "none") or reads_prompt_too(routed.spec):
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        changed["input_ids"][:, 0] = 5
        moved = decisions_of(routed, changed, said)
        assert any((a.logits_NE != b.logits_NE).any() for a, b in zip(one, moved, strict=True))


def _before(decisions, architecture, inputs):
    """Lines of tokens that stand before the first changed one: 6 of 9; in T5's decoder 4 of 6 (inputs are shifted)."""
    rows = len(inputs["input_ids"])
    width = len(decisions.gates_NE) // rows
    kept = {("llama", 9): 6, ("t5", 9): 9, ("t5", 6): 4}[architecture, width]
    return (torch.arange(width) < kept).repeat(rows)


@presets(lambda spec: spec.scope != "step")
def test_steps_with_a_cache_equal_one_forward(name, routed_preset, say, inputs_of) -> None:
    """Token by token behind a left-padded prompt, against the whole text at once with the same prompt named."""
    routed = routed_preset(name, awake=True)
    inputs = inputs_of("llama")
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    mask[1, :2] = 0
    said = {**say(name), "prompt_mask": torch.ones(3, 5, dtype=torch.bool)}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), routed.told(**said):
        whole = routed.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        cache, parts = None, []
        for stop in range(5, ids.shape[1] + 1):
            start = 0 if cache is None else stop - 1
            output = routed.model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            cache = output.past_key_values
            parts.append(output.logits)
    stepped = torch.cat(parts, 1)
    torch.testing.assert_close(stepped[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-5)


@presets(lambda spec: spec.scope != "step")
def test_generation_with_cache_beams_and_left_padding(name, routed_preset, say) -> None:
    routed = routed_preset(name, awake=True)
    said = say(name)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    options = {"max_new_tokens": 5, "stop_ids": [1]}
    cached = routed.generate(prompts, **options, **said)
    assert cached == routed.generate(prompts, use_cache=False, **options, **said)
    alone = {key: value[1:2] for key, value in said.items()}
    assert routed.generate([prompts[1]], **options, **alone) == [cached[1]]
    beams = routed.generate(prompts, num_beams=2, **options, **said)
    assert beams == routed.generate(prompts, num_beams=2, use_cache=False, **options, **said)
    assert not routed.training


@pytest.mark.parametrize("name", one_of_each_kind(names_of(lambda spec: spec.scope != "step")))
def test_generation_of_t5_with_cache(name, routed_preset, say) -> None:
    routed = routed_preset(name, "t5", awake=True)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    options = {"max_new_tokens": 4, "stop_ids": [1], **say(name)}
    assert routed.generate(prompts, **options) == routed.generate(prompts, use_cache=False, **options)


@presets_on("t5", "bert")
def test_nothing_is_left_behind(name, architecture, routed_preset, say, inputs_of) -> None:
    routed = routed_preset(name, architecture, awake=True)
    inputs, model, attached = inputs_of(architecture), routed.model, routed.attached
    originals = {target: layer.base_layer for target, layer in attached.layers.items()}
    weights = {target: module.weight.detach().clone() for target, module in originals.items()}
    bare = bare_logits(routed, inputs)
    logits_of(routed, inputs, say(name))
    routed.remove()
    attached.detach()
    for target, module in originals.items():
        assert model.get_submodule(target) is module
        assert torch.equal(module.weight, weights[target])
    with torch.no_grad():
        assert torch.equal(model(**without_labels(routed, inputs)).logits, bare)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


@presets(lambda spec: spec.gate is not None)
def test_one_seed_one_router(name, routed_preset) -> None:
    states = [
        {key: value for key, value in routed_preset(name, seed=seed).state_dict().items() if key.startswith("router.")}
        for seed in (3, 3)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_registry_holds_the_papers() -> None:
    wanted = (
        "none_r8 none_r64 linear_fusion multilora molora mov moelora_cl mola loramoe moral moelora_task mocle "
        "llava_mole xlora xlora_layerwise moa mixlora_lin adamole hydralora lora_flow sira octavius poly mhr smear "
        "meteora smora hmora ld_mole dynmole goat moe_riemann align_lora lora_mixer"
    )
    assert not set(wanted.split()) - set(NAMES)
