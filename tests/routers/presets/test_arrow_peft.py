"""Arrow equals PEFT's on adapters of one rank whose spectra are peaked, where its power iteration converges.

Compared are prototypes up to sign, and logits. On flat spectra PEFT's prototypes depend on a seed, so there only what
follows from prototypes can be compared, with PEFT's own copied across; that is the second test.
"""

import copy

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.formats.peft import read_adapter
from compose.routers.builder import build
from compose.routers.general_knowledge import subtract_general
from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import preset
from compose.routers.selectors.top_k import TopK

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS, GENERAL = 4, 2


def saved(tiny_model, tmp_path, *, peak):
    """(base model, folders of experts, folders of general adapters); the first rank is ``peak`` times the others."""
    model = tiny_model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    names = [f"lora-{index}" for index in range(EXPERTS + GENERAL)]
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" not in name:
                continue
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            if "lora_A" in name:
                values[1:] /= peak
            if any(f".{general}." in name for general in names[EXPERTS:]):
                values *= 0.1
            parameter.copy_(values)
    wrapped.save_pretrained(str(tmp_path))
    folders = [tmp_path / name for name in names]
    return model, folders[:EXPERTS], folders[EXPERTS:]


def peft_arrow(model, folders, general=(), **options):
    config = peft.ArrowConfig(rng_seed=0, use_gks=bool(general), **options)
    return peft.tuners.lora.arrow.create_arrow_model(
        copy.deepcopy(model),
        [str(f) for f in folders],
        config,
        general_adapter_paths=[str(f) for f in general] or None,
    ).eval()


def logits(model, inputs):
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def peft_prototypes(theirs):
    found = {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_arrow") and "arrow_router" in module.lora_arrow:
            found[name[name.index("model.layers") :]] = module.lora_arrow["arrow_router"].prototypes
    return found


def our_prototypes(routed):
    return {
        site.leader: routed.router.site(name).gate.prototypes_EPD[:, 0] for name, site in routed.router.layout.items()
    }


@pytest.mark.parametrize(("k", "temperature"), [(3, 1.0), (2, 0.5)])
def test_peaked_spectra(k, temperature, tiny_model, tmp_path, batch) -> None:
    model, folders, _ = saved(tiny_model, tmp_path, peak=12.0)
    theirs = peft_arrow(model, folders, top_k=k, router_temperature=temperature)
    wanted = logits(theirs, batch("llama"))
    spec = preset("arrow", select=TopK(k=k), normalise=Softmax(temperature=temperature))
    routed = build(attach(copy.deepcopy(model), Bank.open(folders)), spec)
    their_prototypes = peft_prototypes(theirs)
    assert their_prototypes.keys() == our_prototypes(routed).keys()
    for target, prototypes in our_prototypes(routed).items():
        cosines = (prototypes * their_prototypes[target]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(EXPERTS), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(routed, batch("llama")), wanted, rtol=0, atol=1e-5)


def test_flat_spectra_with_their_prototypes(tiny_model, tmp_path, batch) -> None:
    model, folders, _ = saved(tiny_model, tmp_path, peak=1.0)
    theirs = peft_arrow(model, folders)
    wanted = logits(theirs, batch("llama"))
    routed = build(attach(copy.deepcopy(model), Bank.open(folders)), preset("arrow"))
    their_prototypes = peft_prototypes(theirs)
    worst = min(
        float((prototypes * their_prototypes[target]).sum(1).abs().min())
        for target, prototypes in our_prototypes(routed).items()
    )
    assert worst < 0.9  # 15 iterations are not enough here
    for name, site in routed.router.layout.items():
        for expert in range(EXPERTS):
            routed.router.site(name).gate.fill_(expert, their_prototypes[site.leader][expert][None])
    torch.testing.assert_close(logits(routed, batch("llama")), wanted, rtol=0, atol=1e-5)


def test_general_knowledge_in_the_space_of_factors(tiny_model, tmp_path, batch) -> None:
    model, folders, general = saved(tiny_model, tmp_path, peak=12.0)
    theirs = peft_arrow(model, folders, general)
    wanted = logits(theirs, batch("llama"))
    adapters = subtract_general(
        [read_adapter(folder) for folder in folders], [read_adapter(folder) for folder in general], space="factors"
    )
    routed = build(attach(copy.deepcopy(model), Bank.from_adapters(adapters)), preset("arrow"))
    torch.testing.assert_close(logits(routed, batch("llama")), wanted, rtol=0, atol=2e-5)
    plain = build(attach(copy.deepcopy(model), Bank.open(folders)), preset("arrow"))
    assert (logits(plain, batch("llama")) - wanted).abs().max() > 1e-3
