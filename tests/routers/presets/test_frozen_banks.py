"""What every preset over a frozen bank keeps: JSON, caches, beams, left padding, missing experts, padding."""

import json

import pytest
import torch

from compose.routers.gates.proto import Prototypes
from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import PRESETS, preset
from compose.routers.selectors.every import All
from compose.routers.spec import MixtureSpec

NAMES = (
    "arrow", "arrow_mttl", "spectr", "smile", "logo", "avg_act", "color", "phatgoose", "token_level", "dlp",
    "router_retriever", "mole_pooled", "am_lora",
)  # fmt: skip
WIDTH = 6
every = pytest.mark.parametrize("name", NAMES)


def filled(routed):
    generator = torch.Generator().manual_seed(0)
    for gate in routed.router.modules():
        if isinstance(gate, Prototypes) and gate.options.source != "svd":
            for expert in range(len(gate.filled_E)):
                gate.fill_(expert, torch.randn(gate.prototypes_EPD.shape[1:], generator=generator))
    with torch.no_grad():
        for parameter in routed.router.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return routed


def told(name, rows):
    text = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"text_embedding": text} if "text" in PRESETS[name].needs else {}


@every
def test_json(name) -> None:
    spec = preset(name)
    assert MixtureSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert PRESETS[name].paper


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@every
def test_a_cache_changes_nothing(name, architecture, routed_over) -> None:
    routed = filled(routed_over(architecture, preset(name), text_features=WIDTH))
    prompts, said = [[5, 6, 7, 8], [9, 10], [11, 12, 13]], told(name, 3)
    for options in ({}, {"num_beams": 2}):
        cached = routed.generate(prompts, max_new_tokens=6, stop_ids=[1], **options, **said)
        assert cached == routed.generate(prompts, max_new_tokens=6, stop_ids=[1], use_cache=False, **options, **said)
    for row, prompt in enumerate(prompts):
        alone = {key: value[row : row + 1] for key, value in said.items()}
        (one,) = routed.generate([prompt], max_new_tokens=6, stop_ids=[1], num_beams=2, **alone)
        assert one == cached[row]


@every
def test_missing_experts_get_no_gate(name, routed_over, batch) -> None:
    routed = filled(routed_over("llama", preset(name), skip="layers.0", text_features=WIDTH))
    with torch.no_grad(), routed.recording() as decisions:
        output = routed(**batch("llama"), **told(name, 3))
    assert output.logits.isfinite().all()
    for each in decisions:
        assert each.gates_NE.isfinite().all()
        missing = ~each.available_E
        assert missing.any() == (each.layer == 0)
        assert each.gates_NE[:, missing].abs().sum() == 0


@every
def test_padding_changes_no_logit(name, routed_over, batch) -> None:
    routed = filled(routed_over("llama", preset(name), text_features=WIDTH))
    inputs, said = batch("llama"), told(name, 3)
    mask = inputs["attention_mask"].bool()
    outputs = []
    for fill in (5, 50):
        inputs["input_ids"][~mask] = fill
        with torch.no_grad():
            outputs.append(routed(**inputs, **said).logits[mask])
    assert torch.equal(*outputs)


@every
def test_nothing_stays_on_the_model(name, routed_over, batch) -> None:
    routed = filled(routed_over("llama", preset(name), text_features=WIDTH))
    model, inputs = routed.model, batch("llama")
    with torch.no_grad():
        routed(**inputs, **told(name, 3))
        with routed.disable():
            off = model(**inputs).logits
        routed.attached.detach()
        torch.testing.assert_close(model(**inputs).logits, off, rtol=0, atol=0)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("name", [name for name in NAMES if PRESETS[name].spec.pooling != "none"])
def test_gates_per_sequence_read_the_prompt_alone(name, architecture, routed_over, batch) -> None:
    routed = filled(routed_over(architecture, preset(name, normalise=Softmax(), select=All(), renormalise="none")))

    def gates(inputs):
        with torch.no_grad(), routed.recording() as decisions:
            routed(**inputs)
        return torch.cat([each.gates_NE for each in decisions])

    inputs = batch(architecture)
    before, changed = gates(inputs), {key: value.clone() for key, value in inputs.items()}
    changed["labels"][:, -3:] = 5
    if architecture == "llama":
        changed["input_ids"][:, 5:] = 5
    assert torch.equal(gates(changed), before)
    changed["input_ids"][:, 0] = 7
    assert not torch.equal(gates(changed), before)
