"""Laws of saving over all presets: what a folder holds is the mixture, whatever it is made of."""

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.routed import open_routed
from compose.routers.builder import build
from compose.routers.presets.registry import PRESETS, experts_for

TASKS = ("one", "two")


def built(name, model, make_experts):
    """A preset over random experts, or over its own, moved away from their start."""
    spec, own = PRESETS[name].spec, PRESETS[name].experts is not None
    bank = Bank.from_adapters(experts_for(name, model)) if own else make_experts(model, ranks=(4, 4, 4, 4))
    attached = attach(model, bank, trainable=spec.trains_experts and spec.structure in ("lora", "ffn"))
    width = len(bank) if spec.gate_input == "text" else 0
    routed = build(attached, spec, tasks=TASKS, clusters=3, text_features=width).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in routed.trained_parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return routed, None if own else bank


def run(routed):
    rows = 3
    generator = torch.Generator().manual_seed(3)
    said = {
        "task_id": {"task_ids": torch.tensor([0, 1, 1])},
        "cluster_id": {"cluster_ids": torch.tensor([0, 2, 1])},
        "text": {"text_embedding": torch.randn(rows, routed.numbers["text_features"], generator=generator)},
    }.get(routed.spec.gate_input, {})
    with torch.no_grad():
        return routed(input_ids=torch.randint(3, 67, (rows, 7), generator=generator), **said).logits


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_saved_preset_computes_the_same(name, tiny_model, make_experts, tmp_path) -> None:
    model = tiny_model("llama")
    routed, bank = built(name, model, make_experts)
    unfilled = "calibration" in PRESETS[name].needs  # prototypes that only data fill
    wanted = None if unfilled else run(routed)
    routed.save(tmp_path / "saved")
    spec, trained = routed.spec, set(routed.trained_parameters())
    routed.attached.detach()
    torch.manual_seed(9)
    opened = open_routed(model, bank, tmp_path / "saved")
    assert opened.spec == spec
    assert set(opened.trained_parameters()) == trained
    if wanted is not None:
        torch.testing.assert_close(run(opened.eval()), wanted, rtol=0, atol=0)
