"""Poly and MHR against PEFT's Poly with weights copied across, and by hand."""

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.routers.builder import build
from compose.routers.experts import linear_targets
from compose.routers.presets.registry import experts_for, preset

TASKS = ("a", "b", "c")


def ours(model, splits):
    targets = [target for target in linear_targets(model) if target.endswith(("q_proj", "down_proj"))]
    bank = Bank.from_adapters(experts_for("poly", model, targets))
    return build(attach(model, bank, trainable=True), preset("poly", splits=splits), tasks=TASKS)


def copy_to_peft(routed, theirs, splits) -> None:
    """Random factors and scores, the same on both sides."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for target, layer in routed.attached.layers.items():
            for parameter in (layer.a_RD, layer.b_RO):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            site = routed.router.site(target).gate
            gates = [site] if splits == 1 else list(site)
            for gate in gates:
                gate.table_NE.copy_(torch.randn(gate.table_NE.shape, generator=generator))
            other = theirs.get_submodule(f"base_model.model.{target}")
            a_ErSd = layer.a_RD.unflatten(0, (4, -1)).unflatten(-1, (splits, -1))
            b_ErSd = layer.b_RO.unflatten(0, (4, -1)).unflatten(-1, (splits, -1))
            other.poly_lora_A["default"].copy_(a_ErSd.permute(2, 0, 3, 1))
            other.poly_lora_B["default"].copy_(b_ErSd.permute(2, 0, 1, 3))
            other.poly_router["default"].module_logits.copy_(torch.cat([gate.table_NE for gate in gates], 1))


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equal_to_peft(splits, tiny_model, inputs_of) -> None:
    from peft import PolyConfig, TaskType, get_peft_model

    config = PolyConfig(
        task_type=TaskType.CAUSAL_LM, poly_type="poly", r=8, n_tasks=3, n_skills=4, n_splits=splits,
        target_modules=["q_proj", "down_proj"],
    )  # fmt: skip
    theirs = get_peft_model(tiny_model("llama"), config).eval()
    routed = ours(tiny_model("llama"), splits).eval()
    copy_to_peft(routed, theirs, splits)
    inputs, task_ids = inputs_of("llama"), torch.tensor([2, 0, 2])
    mine, other = routed(**inputs, task_ids=task_ids), theirs(**inputs, task_ids=task_ids)
    torch.testing.assert_close(mine.logits, other.logits, rtol=1e-5, atol=1e-5)
    mine.loss.backward()
    other.loss.backward()
    for target, layer in routed.attached.layers.items():
        peer = theirs.get_submodule(f"base_model.model.{target}")
        a = layer.a_RD.grad.unflatten(0, (4, -1)).unflatten(-1, (splits, -1)).permute(2, 0, 3, 1)
        torch.testing.assert_close(a, peer.poly_lora_A["default"].grad, rtol=1e-4, atol=1e-6)
        site = routed.router.site(target).gate
        rows = torch.cat([gate.table_NE.grad for gate in ([site] if splits == 1 else site)], 1)
        torch.testing.assert_close(rows, peer.poly_router["default"].module_logits.grad, rtol=1e-4, atol=1e-6)


def test_gates_are_sampled_in_training(small) -> None:
    mixture = small(preset("poly"), tasks=TASKS)
    said = {"task_ids": torch.tensor([0, 2])}
    assert torch.equal(mixture.run(**said), mixture.run(**said))
    mixture.routed.train()
    assert not torch.equal(mixture.run(**said), mixture.run(**said))


def test_an_unknown_task_reads_the_mean_row(small) -> None:
    mixture = small(preset("poly"), tasks=TASKS)
    with torch.no_grad():
        mixture.gate.table_NE.normal_()
    z = torch.sigmoid(mixture.gate.table_NE.detach().double().mean(0))
    z = z / z.sum()
    output = mixture.run(task_ids=torch.tensor([-1, -1]))
    stack = mixture.attached.layers["layers.0.mlp.up_proj"].stack
    a = sum(weight * stack.factors(expert)[0].detach() for expert, weight in enumerate(z))
    b = sum(weight * stack.factors(expert)[1].detach() for expert, weight in enumerate(z))
    expected = mixture.base() + 1.5 * (mixture.read() @ a.T) @ b  # alpha 3 / rank 2
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
