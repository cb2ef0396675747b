"""Mixtures on disk: the same logits in another process, other banks refused, hostile files refused."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.routed import open_routed
from compose.errors import AdapterFormatError, ComposeError, DuplicateNameError, IncompatibleError
from compose.formats.peft import write_adapter
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.gates.linear import LinearGate
from compose.routers.gates.mlp import MlpGate
from compose.routers.presets.registry import PRESETS
from compose.routers.saved import load, mixture_files, save
from compose.routers.saved_file import read_mixture
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec

NORMAL = LinearGate(init="normal", std=1.0, bias=True)
TOKEN = MixtureSpec(gate=NORMAL, select=TopK(k=2), renormalise="sum")
BOTH = MixtureSpec(gate=NORMAL, train="both")
SPECS = {
    "token": TOKEN,
    "both": BOTH,
    "first_pass": MixtureSpec(gate=MlpGate(depth=2, bias=True), site="model", gate_input="first_pass"),
    "pattern": MixtureSpec(gate=NORMAL, targets="mlp", post="bias", post_init=0.5),
}

ELSEWHERE = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import TINY_MODELS
from compose.engine.attach import attach
from compose.bank import Bank
from compose.routers.saved import load
torch.set_num_threads(1)
torch.manual_seed(0)
model = TINY_MODELS[{name!r}]().eval()
attached = attach(model, Bank.open({bank!r}), trainable={trainable})
torch.manual_seed(123)
routed = load(attached, {folder!r})
inputs = torch.load({inputs!r})
with torch.no_grad():
    torch.save(routed(**inputs).logits, {out!r})
"""


def inputs_of(name, batch):
    given = batch(name)
    labels = given.pop("labels")
    return {**given, "decoder_input_ids": labels.clamp_min(0)} if name == "t5" else given


def logits(routed, inputs):
    with torch.no_grad():
        return routed(**inputs).logits


def shaken(routed):
    """Everything that trains, moved away from its start."""
    generator = torch.Generator().manual_seed(5)
    for parameter in routed.trained_parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return routed


@pytest.fixture
def on_disk(tmp_path, make_experts):
    """Return a factory: the bank of random experts as PEFT folders."""

    def make(model, **options):
        bank = make_experts(model, **options)
        for name in bank.names:
            write_adapter(bank[name], tmp_path / "bank" / name)
        return tmp_path / "bank"

    return make


@pytest.mark.parametrize(("name", "spec"), [("llama", spec) for spec in SPECS] + [("gpt2", "both"), ("t5", "token")])
def test_another_process_computes_identical_logits(
    name, spec, tmp_path, tiny_model, on_disk, batch, request, warm_python
) -> None:
    spec = SPECS[spec]
    model = tiny_model(name)
    bank = on_disk(model, skip="q_proj")
    routed = shaken(build(attach(model, Bank.open(bank), trainable=spec.trains_experts), spec, seed=4))
    inputs = inputs_of(name, batch)
    wanted = logits(routed, inputs)
    assert routed.save(tmp_path / "saved") == tmp_path / "saved"
    torch.save(inputs, tmp_path / "inputs.pt")
    program = ELSEWHERE.format(
        tests=str(request.config.rootpath / "tests"), name=name, bank=str(bank), trainable=spec.trains_experts,
        folder=str(tmp_path / "saved"), inputs=str(tmp_path / "inputs.pt"), out=str(tmp_path / "out.pt"),
    )  # fmt: skip
    done = warm_python.run(program)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), wanted, rtol=0, atol=0)


def test_files_hold_what_trained_and_no_more(tmp_path, routed_over) -> None:
    routed_over("llama", TOKEN).save(tmp_path / "router")
    assert {path.name for path in (tmp_path / "router").iterdir()} == {"mixture.json", "router.safetensors"}
    description = json.loads((tmp_path / "router" / "mixture.json").read_text())
    assert set(description["hashes"]) == {f"expert-{i}" for i in range(4)}
    assert MixtureSpec.from_json(description["spec"]) == TOKEN
    routed_over("llama", BOTH).save(tmp_path / "both")
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert names == {"mixture.json", "router.safetensors", "experts.safetensors"}
    tensors = safetensors.torch.load_file(tmp_path / "both" / "experts.safetensors")
    assert "expert-2:model.layers.0.mlp.up_proj:b" in tensors


def test_an_existing_folder_is_refused_unless_overwritten(tmp_path, routed_over) -> None:
    routed = routed_over("llama", TOKEN)
    save(routed, tmp_path / "saved")
    with pytest.raises(DuplicateNameError, match="exists"):
        save(routed, tmp_path / "saved")
    shaken(routed)
    save(routed, tmp_path / "saved", overwrite=True)
    state = read_mixture(tmp_path / "saved").state
    name, parameter = next(iter(routed.router.named_parameters()))
    assert torch.equal(state["router." + name.replace("/", ".")], parameter)


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, routed_over, monkeypatch) -> None:
    routed = routed_over("llama", TOKEN)
    save(routed, tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    shaken(routed)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(routed, tmp_path / "saved", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_values_that_are_not_finite_are_not_saved(tmp_path, routed_over) -> None:
    routed = routed_over("llama", TOKEN)
    next(routed.router.parameters()).data.fill_(float("nan"))
    with pytest.raises(AdapterFormatError, match="not finite"):
        save(routed, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_another_order_or_other_adapters_are_refused_with_the_next_step(
    tmp_path, tiny_model, make_experts, batch
) -> None:
    model = tiny_model("llama")
    bank = make_experts(model)
    attached = attach(model, bank)
    routed = shaken(build(attached, TOKEN))
    wanted = logits(routed, inputs_of("llama", batch))
    save(routed, tmp_path / "saved")
    attached.detach()
    attached = attach(model, bank.select(reversed(bank.names)))
    with pytest.raises(IncompatibleError, match=r"bank\.select\(\['expert-0', 'expert-1'"):
        load(attached, tmp_path / "saved")
    attached.detach()
    attached = attach(model, bank.select(["expert-0", "expert-1", "expert-2"]))
    with pytest.raises(IncompatibleError, match="lacks expert-3"):
        load(attached, tmp_path / "saved")
    attached.detach()
    attached = attach(model, bank.select(bank.names))
    torch.testing.assert_close(
        logits(load(attached, tmp_path / "saved"), inputs_of("llama", batch)), wanted, rtol=0, atol=0
    )


def test_changed_adapters_are_refused_unless_allowed(tmp_path, tiny_model, make_experts) -> None:
    model = tiny_model("llama")
    attached = attach(model, make_experts(model))
    save(build(attached, TOKEN), tmp_path / "saved")
    attached.detach()
    attached = attach(model, make_experts(model, seed=1))
    with pytest.raises(IncompatibleError, match="allow_changed=True"):
        load(attached, tmp_path / "saved")
    assert load(attached, tmp_path / "saved", allow_changed=True).router.experts == attached.bank.names


def test_trained_experts_replace_those_of_a_fresh_bank(tmp_path, tiny_model, batch) -> None:
    model = tiny_model("llama")
    fresh = fresh_experts(model, linear_targets(model), num_experts=3, rank=2)
    attached = attach(model, Bank.from_adapters(fresh), trainable=True)
    routed = shaken(build(attached, BOTH))
    wanted = logits(routed, inputs_of("llama", batch))
    save(routed, tmp_path / "saved")
    attached.detach()
    other = fresh_experts(model, linear_targets(model), num_experts=3, rank=2, seed=9)
    attached = attach(model, Bank.from_adapters(other), trainable=True)
    routed = load(attached, tmp_path / "saved")
    torch.testing.assert_close(logits(routed, inputs_of("llama", batch)), wanted, rtol=0, atol=0)
    assert set(routed.trained_parameters()) > {"router.gates.model/layers/0/mlp/up_proj.gate.weight_ED"}
    attached.detach()
    attached = attach(model, Bank.from_adapters(fresh_experts(model, linear_targets(model), num_experts=3, rank=4)),
                      trainable=True)  # fmt: skip
    with pytest.raises(IncompatibleError, match="open_routed"):
        load(attached, tmp_path / "saved")
    assert attached.active is None  # nothing half loaded stays in force


@pytest.mark.parametrize("structure", ["shared_a", "ia3"])
def test_experts_that_are_no_stack_come_back(structure, tmp_path, tiny_model, batch) -> None:
    model = tiny_model("llama")
    init = {"shared_a": "tied", "ia3": "empty"}[structure]
    spec = MixtureSpec(gate=NORMAL, structure=structure, train="both")
    make = {"num_experts": 3, "rank": 2, "init": init}
    attached = attach(model, Bank.from_adapters(fresh_experts(model, linear_targets(model), **make)))
    routed = shaken(build(attached, spec))
    wanted = logits(routed, inputs_of("llama", batch))
    save(routed, tmp_path / "saved")
    attached.detach()
    attached = attach(model, Bank.from_adapters(read_mixture(tmp_path / "saved").adapters()))
    routed = load(attached, tmp_path / "saved")
    torch.testing.assert_close(logits(routed, inputs_of("llama", batch)), wanted, rtol=0, atol=0)


def edit(folder, change):
    file = folder / "mixture.json"
    plain = json.loads(file.read_text())
    change(plain)
    file.write_text(json.dumps(plain))


def hostile(field, value):
    return lambda folder: edit(folder, lambda plain: plain.__setitem__(field, value))


HOSTILE = {
    "no description": (lambda folder: (folder / "mixture.json").unlink(), "no mixture.json"),
    "not json": (lambda folder: (folder / "mixture.json").write_text("{"), "not valid JSON"),
    "a list": (lambda folder: (folder / "mixture.json").write_text("[]"), "must be a JSON object"),
    "twice": (lambda folder: (folder / "mixture.json").write_text('{"format": 1, "format": 2}'), "duplicate key"),
    "nan": (lambda folder: (folder / "mixture.json").write_text('{"format": NaN}'), "NaN"),
    "version": (hostile("version", 2), "reads compose-mixture version 1"),
    "unknown field": (hostile("extra", 1), "'extra' is no field"),
    "no field": (lambda folder: edit(folder, lambda plain: plain.pop("experts")), "experts must be"),
    "wrong kind": (hostile("tasks", "a"), "tasks must be a list"),
    "path": (hostile("files", {"../x.safetensors": ""}), "files may be"),
    "huge": (hostile("clusters", 10**12), "clusters must be"),
    "spec kind": (hostile("spec", {"noise": "x"}), "value of a wrong kind"),
    "spec name": (hostile("spec", {"gate": {"name": "os.system"}}), "unknown gate network"),
    "spec field": (hostile("spec", {"code": "x"}), "unknown field"),
    "routed": (hostile("routed", ["lm_head"]), "routed names what targets does not"),
    "no weights": (lambda folder: (folder / "router.safetensors").unlink(), "cannot be opened"),
    "cut": (
        lambda folder: (folder / "router.safetensors").write_bytes((folder / "router.safetensors").read_bytes()[:-9]),
        "truncated",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, tmp_path, routed_over) -> None:
    routed = routed_over("llama", TOKEN)
    save(routed, tmp_path / "saved")
    spoil, words = HOSTILE[name]
    spoil(tmp_path / "saved")
    with pytest.raises(ComposeError, match=words):
        load(routed.attached, tmp_path / "saved")


def test_files_of_two_mixtures_are_not_mixed(tmp_path, routed_over) -> None:
    routed = routed_over("llama", BOTH)
    save(routed, tmp_path / "one")
    save(shaken(routed), tmp_path / "two")
    shutil.copy(tmp_path / "one" / "experts.safetensors", tmp_path / "two" / "experts.safetensors")
    with pytest.raises(AdapterFormatError, match="mixed from two"):
        read_mixture(tmp_path / "two")


def test_a_state_of_other_sites_is_refused_by_name(tmp_path, routed_over) -> None:
    routed = routed_over("llama", TOKEN)
    files = mixture_files(routed)
    plain = json.loads(files["mixture.json"])
    plain["spec"]["gate"]["bias"] = False
    save(routed, tmp_path / "saved")
    (tmp_path / "saved" / "mixture.json").write_text(json.dumps(plain))
    with pytest.raises(AdapterFormatError, match="bias_E belongs to nothing"):
        load(routed.attached, tmp_path / "saved")


@torch.no_grad()
def test_experts_that_are_parts_of_the_base_open_on_a_model_in_half_precision(tmp_path, tiny_model, batch) -> None:
    model = tiny_model("llama")
    found = PRESETS["goat"]
    targets = [target for target in linear_targets(model) if re.search(found.spec.targets, target)]
    with attach(model, Bank.from_adapters(found.experts.make(model, targets, seed=0)), trainable=True) as attached:
        routed = build(attached, found.spec)
        routed.save(tmp_path / "goat")
        inputs = {"input_ids": batch("llama")["input_ids"]}
        want = routed(**inputs).logits
    opened = open_routed(tiny_model("llama").to(torch.bfloat16), None, tmp_path / "goat")
    torch.testing.assert_close(opened(**inputs).logits.float(), want, atol=0.05, rtol=0.05)
