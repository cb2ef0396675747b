"""X-LoRA equals PEFT's with the classifier's weights copied across: logits, gradients, generated tokens."""

import copy

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.routers.builder import build
from compose.routers.gates.mlp import MlpGate
from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import preset
from compose.routers.selectors.top_k import TopK

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = 4


@pytest.fixture
def saved(tiny_model, tmp_path):
    """(base model, folders of four adapters of one rank), float32."""
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="lora-0")
    for index in range(1, EXPERTS):
        wrapped.add_adapter(f"lora-{index}", config)
    wrapped.save_pretrained(str(tmp_path))
    return model, [tmp_path / f"lora-{index}" for index in range(EXPERTS)]


def peft_xlora(model, folders, **options):
    model = copy.deepcopy(model)
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={str(i): str(f) for i, f in enumerate(folders)}, **options
    )
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.base_model.internal_xlora_classifier.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def ours(model, folders, spec, theirs):
    routed = build(attach(copy.deepcopy(model), Bank.open(folders)), spec)
    classifier = theirs.base_model.internal_xlora_classifier
    *inner, last = [layer for layer in classifier.layers if isinstance(layer, torch.nn.Linear)]
    layerwise = last.out_features != EXPERTS
    order = _peft_order(theirs)
    with torch.no_grad():
        for name, site in routed.router.layout.items():
            layers = [m for m in routed.router.site(name).gate.layers if isinstance(m, torch.nn.Linear)]
            for mine, their in zip(layers[:-1], inner, strict=True):
                mine.load_state_dict(their.state_dict())
            rows = slice(None)
            if layerwise:
                place = order.index(site.leader)
                rows = slice(place * EXPERTS, (place + 1) * EXPERTS)
            layers[-1].weight.copy_(last.weight[rows])
            layers[-1].bias.copy_(last.bias[rows])
    return routed


def _peft_order(theirs) -> list[str]:
    """PEFT numbers its layers in module order."""
    names = [
        name for name, module in theirs.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    ]
    return [name[name.index("model.layers") :] for name in names]


CASES = {
    "plain": ({}, {}),
    "layerwise": ({"layerwise_scalings": True}, {"site": "linear"}),
    "top_2": ({"top_k_lora": 2}, {"select": TopK(k=2)}),
    "deep": ({"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0}, {"gate": MlpGate(depth=2, hidden=16)}),
    "scaled": ({"global_scaling_weight": 1.5, "softmax_temperature": 2.0}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, saved, batch) -> None:
    model, folders = saved
    theirs_options, options = CASES[case]
    if options is None:
        options = {"global_scale": 1.5, "normalise": Softmax(temperature=2.0)}
    theirs = peft_xlora(model, folders, **theirs_options)
    routed = ours(model, folders, preset("xlora", **options), theirs)
    inputs = batch("llama")
    their_output, our_output = theirs(**inputs), routed(**inputs)
    torch.testing.assert_close(our_output.logits, their_output.logits, rtol=0, atol=1e-5)
    their_output.loss.backward()
    our_output.loss.backward()
    their_grad = [p.grad for p in theirs.base_model.internal_xlora_classifier.parameters()][-2]
    grads = {name: routed.router.site(name).gate.layers[-1].weight.grad for name in routed.router.layout}
    if case == "layerwise":
        leaders = {routed.router.layout[name].leader: grad for name, grad in grads.items()}
        our_grad = torch.cat([leaders[target] for target in _peft_order(theirs)])
    else:
        (our_grad,) = grads.values()
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "layerwise"])
def test_generated_tokens(case, saved) -> None:
    model, folders = saved
    theirs_options, options = CASES[case]
    theirs = peft_xlora(model, folders, **theirs_options)
    routed = ours(model, folders, preset("xlora", **options), theirs)
    prompt = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    wanted = theirs.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, eos_token_id=1
    )
    rows = [row[: row.index(1)] if 1 in row else row for row in wanted[:, 5:].tolist()]
    assert routed.generate(prompt, max_new_tokens=10, stop_ids=[1]) == rows
