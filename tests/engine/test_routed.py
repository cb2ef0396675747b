"""Saved mixtures opened over a bank, and constant gates as one ordinary adapter: exact."""

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.paging import attach_paged
from compose.engine.routed import export_static, open_routed
from compose.errors import IncompatibleError, UnknownNameError
from compose.formats.peft import read_adapter, write_adapter
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets, linear_widths
from compose.routers.gates.embedding import EmbeddingGate
from compose.routers.gates.linear import LinearGate
from compose.routers.gates.table import TableGate
from compose.routers.normalisations.softmax import Softmax
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

TABLE, PER_TASK, PER_CLUSTER = TableGate(), TableGate(rows="tasks"), TableGate(rows="clusters")
STATIC = {"scope": "static", "gate_input": "none"}
TASK = {"scope": "task", "gate_input": "task_id"}
SPECS = {
    "static": MixtureSpec(gate=TABLE, **STATIC),
    "static_model": MixtureSpec(gate=TABLE, site="model", **STATIC),
    "no_gate": MixtureSpec(gate=None, train="experts", **STATIC),
    "task": MixtureSpec(gate=EmbeddingGate(), **TASK),
    "top_k": MixtureSpec(gate=PER_TASK, select=TopK(k=2), renormalise="sum", **TASK),
    "always_on": MixtureSpec(gate=PER_TASK, always_on=("expert-2",), universal="complement", **TASK),
    "missing_zero": MixtureSpec(gate=TABLE, missing="zero", global_scale=1.5, **STATIC),
    "parameters": MixtureSpec(gate=PER_TASK, combine="parameters", **TASK),
    "cluster": MixtureSpec(gate=PER_CLUSTER, scope="sequence", gate_input="cluster_id"),
}


def random_bank(model, ranks=(3, 1, 8, 5), skip="q_proj", seed=0) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    adapters = []
    for index, rank in enumerate(ranks):
        updates = {}
        for target in linear_targets(model):
            width, out = linear_widths(model, target)
            a = torch.randn(rank, width, generator=generator) / width**0.5
            b = torch.randn(out, rank, generator=generator) / rank**0.5
            if not (index == 1 and skip and skip in target):
                updates[target] = LowRank(a, b, 0.5 + 0.25 * index)
        adapters.append(Adapter(f"expert-{index}", "tiny", updates))
    return Bank.from_adapters(adapters)


def shaken(routed):
    generator = torch.Generator().manual_seed(5)
    for parameter in routed.router.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator)
    return routed


def inputs(model, rows=3):
    generator = torch.Generator().manual_seed(3)
    given = {"input_ids": torch.randint(3, 67, (rows, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"][:, :4]
    return given


def told(spec, rows=3):
    """The ids that the gates read: number 1 for every row."""
    name = {"task_id": "task_ids", "cluster_id": "cluster_ids"}.get(spec.gate_input)
    return {} if name is None else {name: torch.full((rows,), 1)}


def which(spec):
    return {"task_id": {"task": "t1"}, "cluster_id": {"cluster": 1}}.get(spec.gate_input, {})


def logits(call, **given):
    with torch.no_grad():
        return call(**given).logits


def same_as_alone(model, adapter, **given):
    """Logits of the base model with one adapter, and nothing of a mixture."""
    with attach(model, Bank.from_adapters([adapter])) as attached:
        attached.set(adapter.name)
        return logits(model, **given)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_exported_adapter_computes_what_the_mixture_computes(name, spec, tiny_model) -> None:
    model = tiny_model(name)
    attached = attach(model, random_bank(model), trainable=spec.trains_experts)
    routed = shaken(build(attached, spec, tasks=("t0", "t1"), clusters=2)).eval()
    given = inputs(model)
    wanted = logits(routed, **given, **told(spec))
    adapter = export_static(routed, **which(spec))
    attached.detach()
    bare = logits(model, **given)
    assert (wanted - bare).abs().max() > 1e-2
    torch.testing.assert_close(same_as_alone(model, adapter, **given), wanted)


def test_ranks_are_those_that_the_form_needs(tiny_model) -> None:
    model = tiny_model("llama")
    attached = attach(model, random_bank(model))
    target = "model.layers.0.mlp.up_proj"
    assert export_static(build(attached, SPECS["static"]), name="x").targets[target].rank == 3 + 1 + 8 + 5
    sparse = export_static(build(attached, SPECS["top_k"], tasks=("a",)), "a")
    assert sparse.name == "mixture-a"
    assert sparse.targets[target].rank < 3 + 1 + 8 + 5
    assert export_static(build(attached, SPECS["parameters"], tasks=("a",)), "a").targets[target].rank == 8


def test_an_exported_adapter_is_an_ordinary_peft_folder(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    attached = attach(model, random_bank(model))
    routed = shaken(build(attached, SPECS["task"], tasks=("t0", "t1")))
    wanted = logits(routed, **inputs(model), task_ids=torch.tensor([1, 1, 1]))
    write_adapter(export_static(routed, "t1"), tmp_path / "adapter")
    attached.detach()
    torch.testing.assert_close(same_as_alone(model, read_adapter(tmp_path / "adapter"), **inputs(model)), wanted)


def test_a_shared_a_keeps_the_rank_of_one_expert(tiny_model) -> None:
    model = tiny_model("llama")
    bank = Bank.from_adapters(fresh_experts(model, linear_targets(model), num_experts=3, rank=2, init="tied"))
    attached = attach(model, bank)
    routed = build(
        attached, MixtureSpec(gate=PER_TASK, structure="shared_a", train="both", **TASK), tasks=("t0", "t1")
    )
    for parameter in routed.mixer.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    wanted = logits(shaken(routed), **inputs(model), task_ids=torch.tensor([1, 1, 1]))
    adapter = export_static(routed, "t1")
    assert {update.rank for update in adapter.targets.values()} == {2}
    attached.detach()
    torch.testing.assert_close(same_as_alone(model, adapter, **inputs(model)), wanted)


def test_mixing_in_splits_exports(tiny_model) -> None:
    model = tiny_model("llama")
    attached = attach(model, random_bank(model, ranks=(4, 4, 4), skip=""))
    spec = MixtureSpec(gate=PER_TASK, combine="parameters", splits=4, normalise=Softmax(), **TASK)
    routed = shaken(build(attached, spec, tasks=("t0", "t1"))).eval()
    wanted = logits(routed, **inputs(model), task_ids=torch.tensor([1, 1, 1]))
    adapter = export_static(routed, "t1")
    attached.detach()
    torch.testing.assert_close(same_as_alone(model, adapter, **inputs(model)), wanted)


def test_what_has_no_static_form_is_refused_with_the_reason(tiny_model) -> None:
    model = tiny_model("llama")
    attached = attach(model, random_bank(model))
    with pytest.raises(IncompatibleError, match="change with every token"):
        export_static(build(attached, MixtureSpec()))
    sequence = MixtureSpec(site="model", scope="sequence", gate_input="embeddings", pooling="mean")
    with pytest.raises(IncompatibleError, match="change with every prompt"):
        export_static(build(attached, sequence))
    routed = build(attached, SPECS["task"], tasks=("t0", "t1"))
    with pytest.raises(IncompatibleError, match="name one of t0, t1"):
        export_static(routed)
    with pytest.raises(UnknownNameError, match="did you mean 't1'"):
        export_static(routed, "t11")
    with pytest.raises(IncompatibleError, match="leave out the task"):
        export_static(build(attached, SPECS["static"]), "t1")
    attached.detach()
    empty = Bank.from_adapters(fresh_experts(model, linear_targets(model), num_experts=2, rank=1, init="empty"))
    attached = attach(model, empty)
    with pytest.raises(IncompatibleError, match="vectors that scale outputs"):
        export_static(build(attached, MixtureSpec(gate=TABLE, structure="ia3", train="both", **STATIC)))


def test_a_mixture_opens_over_a_larger_bank_in_any_order(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    bank = random_bank(model)
    attached = attach(model, bank.select(["expert-2", "expert-0"]))
    routed = shaken(build(attached, MixtureSpec(gate=LinearGate(init="normal", std=1.0))))
    wanted = logits(routed, **inputs(model))
    routed.save(tmp_path / "saved")
    attached.detach()
    opened = open_routed(model, bank, tmp_path / "saved")
    assert opened.attached.bank.names == ("expert-2", "expert-0")
    torch.testing.assert_close(logits(opened, **inputs(model)), wanted, rtol=0, atol=0)
    assert opened.attached.detach() is model
    with pytest.raises(IncompatibleError, match="lacks the experts expert-2"):
        open_routed(model, bank.select(["expert-0", "expert-1"]), tmp_path / "saved")
    with pytest.raises(IncompatibleError, match="stands over a bank"):
        open_routed(model, None, tmp_path / "saved")
    with pytest.raises(IncompatibleError, match="allow_changed"):
        open_routed(model, random_bank(model, seed=1), tmp_path / "saved")
    open_routed(model, bank, tmp_path / "saved").attached.detach()  # nothing stayed attached after the refusals


@pytest.mark.parametrize("structure", ["lora", "shared_a", "ia3"])
def test_trained_experts_need_no_bank(structure, tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    init = {"lora": "kaiming", "shared_a": "tied", "ia3": "empty"}[structure]
    fresh = fresh_experts(model, linear_targets(model), num_experts=3, rank=2, init=init)
    attached = attach(model, Bank.from_adapters(fresh), trainable=structure == "lora")
    routed = build(attached, MixtureSpec(gate=LinearGate(init="normal", std=1.0), structure=structure, train="both"))
    for parameter in routed.trained_parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    wanted = logits(routed, **inputs(model))
    routed.save(tmp_path / "saved")
    names = set(routed.trained_parameters())
    attached.detach()
    opened = open_routed(model, None, tmp_path / "saved")
    torch.testing.assert_close(logits(opened, **inputs(model)), wanted, rtol=0, atol=0)
    assert set(opened.trained_parameters()) == names


def test_a_paged_bank_refuses_a_router(tiny_model) -> None:
    model = tiny_model("llama")
    bank = Bank.from_adapters(fresh_experts(model, linear_targets(model), num_experts=3, rank=2))
    with attach_paged(model, bank, slots=3) as attached, pytest.raises(IncompatibleError, match="use attach"):
        build(attached, MixtureSpec())
