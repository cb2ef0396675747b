"""Other kinds than LoRA that are exactly low rank: PEFT's own forward is the oracle, and hostile files are refused."""

import copy
import json
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import compose
from compose.errors import AdapterFormatError, IncompatibleError
from compose.formats.peft import inspect_adapter, read_adapter, write_adapter
from compose.formats.peft_kinds import KINDS, Found, Opened
from tests.formats.peft_models import LLAMA, build

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj"]
CASES = {
    "adalora llama": ("llama", lambda: peft.AdaLoraConfig(target_modules=LLAMA, init_r=4, lora_alpha=5, total_step=9)),
    "adalora gpt2": (
        "gpt2",
        lambda: peft.AdaLoraConfig(target_modules=["c_attn", "c_fc"], init_r=3, total_step=9, fan_in_fan_out=True),
    ),
    "adalora bert": ("bert", lambda: peft.AdaLoraConfig(target_modules=["query", "value"], init_r=2, total_step=9)),
    "vera llama": ("llama", lambda: peft.VeraConfig(target_modules=ATTENTION, r=6, projection_prng_key=7)),
    "vera gpt2": ("gpt2", lambda: peft.VeraConfig(target_modules=["c_attn", "c_fc"], r=6)),
    "vera t5": ("t5", lambda: peft.VeraConfig(target_modules=["q", "v"], r=5)),
    "loha llama": ("llama", lambda: peft.LoHaConfig(target_modules=LLAMA, r=3, alpha=6)),
    "loha bert": ("bert", lambda: peft.LoHaConfig(target_modules=["query", "value"], r=4)),
    "loha patterns": (
        "llama",
        lambda: peft.LoHaConfig(
            target_modules=ATTENTION, r=3, alpha=6, rank_pattern={"q_proj": 2},
            alpha_pattern={"layers.1.self_attn.v_proj": 7.5},
        ),
    ),
    "lokr llama": ("llama", lambda: peft.LoKrConfig(target_modules=LLAMA, r=1, alpha=3)),
    "lokr both": ("t5", lambda: peft.LoKrConfig(target_modules=["q", "wi", "wo"], r=1, decompose_both=True)),
    "lokr factor": ("bert", lambda: peft.LoKrConfig(target_modules=["query"], r=2, decompose_factor=2)),
}  # fmt: skip


@pytest.fixture
def saved(request, tiny_model, tmp_path):
    """The tiny base, a PEFT model over it with random parameters, and the folder it was saved to."""
    name, config = CASES[request.param]
    return name, build(peft, tiny_model(name), config(), tmp_path / "saved"), tmp_path / "saved"


all_cases = pytest.mark.parametrize("saved", sorted(CASES), indirect=True)


def merged_logits(base, folder, run_model):
    compose.merge(compose.Bank.open(folder)).merge_into(base)
    return run_model(base)


@torch.no_grad()
@all_cases
def test_a_bank_gives_the_logits_of_peft(saved, tiny_model, run_model):
    name, model, folder = saved
    base, expected = tiny_model(name).double(), run_model(model)
    assert (expected - run_model(base)).abs().max() > 1e-5
    bank = compose.Bank.open(folder)
    with compose.attach(base, bank) as attached:
        attached.set(bank.names[0])
        assert_close(run_model(base), expected, rtol=1e-4, atol=1e-5)  # runtime scalings are float32
    assert_close(merged_logits(base, folder, run_model), expected, rtol=1e-9, atol=1e-9)


@all_cases
def test_headers_tell_what_is_read_and_what_is_written_is_lora(saved, tiny_model, run_model, tmp_path):
    name, model, folder = saved
    header, adapter = inspect_adapter(folder), read_adapter(folder)
    assert list(header.targets) == list(adapter.targets)
    for path, update in adapter.targets.items():
        shown = (update.kind, update.rank, update.in_features, update.out_features, update.scaling, update.a.dtype)
        assert header.targets[path][:6] == shown
        assert update.rank < min(update.in_features, update.out_features) or name == "vera"
    written = write_adapter(adapter, tmp_path / "written")
    assert json.loads((written / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        reloaded = peft.PeftModel.from_pretrained(tiny_model(name).double(), written, autocast_adapter_dtype=False)
    with torch.no_grad():
        assert_close(run_model(reloaded.double().eval()), run_model(model), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_whole_modules_are_kept_and_written(tiny_model, run_model, tmp_path):
    config = peft.LoHaConfig(target_modules=["query"], r=2, task_type="SEQ_CLS")
    model = build(peft, tiny_model("bert"), config, tmp_path / "x")
    adapter = read_adapter(tmp_path / "x")
    assert set(adapter.full_modules) == {"classifier.weight", "classifier.bias"}
    assert "classifier.weight" in inspect_adapter(tmp_path / "x").notes[1]
    written = write_adapter(adapter, tmp_path / "y")
    again = peft.PeftModel.from_pretrained(tiny_model("bert").double(), written, autocast_adapter_dtype=False)
    assert_close(run_model(again.double().eval()), run_model(model), rtol=1e-9, atol=1e-9)


def test_half_precision_files_give_exact_products(tiny_model, tmp_path):
    build(peft, tiny_model("llama"), peft.LoHaConfig(target_modules=["q_proj"], r=2), tmp_path / "x")
    path = tmp_path / "x" / "adapter_model.safetensors"
    tensors = {key: value.bfloat16() for key, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)
    update = read_adapter(tmp_path / "x").targets["model.layers.0.self_attn.q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.hada_"
    one, two = ((tensors[f"{key}w{n}_a"].double() @ tensors[f"{key}w{n}_b"].double()) for n in (1, 2))
    assert update.a.dtype == torch.float32
    assert_close(update.scaling * update.b.double() @ update.a.double(), one * two * 4, rtol=1e-15, atol=1e-15)


def test_loha_with_cores_of_one_position_is_tucker(tmp_path):
    from peft.tuners.loha.layer import make_weight_cp

    generator = torch.Generator().manual_seed(0)
    shapes = {"t1": (2, 2, 1, 1), "w1_a": (2, 7), "w1_b": (2, 9), "t2": (2, 2, 1, 1), "w2_a": (2, 7), "w2_b": (2, 9)}
    parts = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    folder = write_raw(
        tmp_path / "x", {f"m.q.hada_{key}": value for key, value in parts.items()}, peft_type="LOHA", r=2
    )
    expected = make_weight_cp(*parts.values(), scale=torch.tensor(4.0)).flatten(1)
    assert_close(read_adapter(folder).targets["m.q"].delta(), expected, rtol=1e-12, atol=1e-12)


def test_lokr_of_two_whole_matrices_is_exact(tmp_path):
    generator = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4), (5, 3)))
    tensors = {"m.q.lokr_w1": w1, "m.q.lokr_w2": w2}
    folder = write_raw(tmp_path / "x", tensors, peft_type="LOKR", r=4, alpha=2, rank_pattern={"q": 8})
    update = read_adapter(folder).targets["m.q"]
    assert (update.rank, update.scaling) == (6, 0.25)
    assert_close(update.delta(), 0.25 * torch.kron(w1, w2), rtol=1e-12, atol=1e-12)
    edit(folder, rank_pattern={".*q": 8})
    with pytest.raises(AdapterFormatError, match=r"rank_pattern key .* is a regular expression"):
        read_adapter(folder)


def write_raw(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": None, **config}))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def pruned(tiny_model, tmp_path):
    """An AdaLoRA adapter after its final pruning: 1, 3 and 0 of 4 rows are left in the three q_proj."""
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, lora_alpha=6, total_step=9)
    model = build(peft, tiny_model("llama"), config, tmp_path / "whole")
    masks = [[False, True, False, False], [True, True, False, True], [False] * 4]
    name = "model.layers.{}.self_attn.q_proj.lora_E.default"
    model.peft_config["default"].rank_pattern = {name.format(layer): mask for layer, mask in enumerate(masks)}
    with torch.no_grad():
        for layer, mask in enumerate(masks):
            model.get_parameter(f"base_model.model.{name.format(layer)}")[~torch.tensor(mask)] = 0.0
    model.save_pretrained(tmp_path / "pruned")
    return model, tmp_path / "pruned"


def test_pruned_adalora_is_read_with_its_scaling(pruned, tiny_model, run_model):
    model, folder = pruned
    header = inspect_adapter(folder)
    assert [target.rank for target in header.targets.values()] == [1, 3]
    assert "1 targets are pruned to rank 0 and left out" in header.notes
    with torch.no_grad():
        found = merged_logits(tiny_model("llama").double(), folder, run_model)
        assert_close(found, run_model(model), rtol=1e-9, atol=1e-9)


def test_pruned_adalora_with_alpha_zero_is_refused(pruned):
    _, folder = pruned
    edit(folder, lora_alpha=0)
    with pytest.raises(AdapterFormatError, match="lora_alpha 0 with pruned ranks"):
        inspect_adapter(folder)


def test_many_masks_for_many_targets_are_refused(pruned, monkeypatch):
    _, folder = pruned
    monkeypatch.setattr("compose.formats.peft_config.MAX_COMPARISONS", 9)
    read_adapter(folder)
    monkeypatch.setattr("compose.formats.peft_config.MAX_COMPARISONS", 8)
    with pytest.raises(AdapterFormatError, match="rank_pattern has 3 entries for 3 tensors or targets"):
        read_adapter(folder)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_vera_without_projections_needs_the_base(tiny_model, tmp_path):
    config = peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=False)
    build(peft, tiny_model("llama"), config, tmp_path / "x")
    with pytest.raises(
        AdapterFormatError, match=r"drawing them again needs.*compose convert \S+/x --out DIR --base MODEL$"
    ):
        read_adapter(tmp_path / "x")
    edit(tmp_path / "x", save_projection=True)
    with pytest.raises(AdapterFormatError, match="missing though save_projection is set"):
        read_adapter(tmp_path / "x")


def test_vera_over_layers_of_several_widths_never_fits_in_silence(tiny_model, tmp_path):
    build(peft, tiny_model("llama"), peft.VeraConfig(target_modules=LLAMA, r=4), tmp_path / "x")
    assert "compose convert --base MODEL" in inspect_adapter(tmp_path / "x").notes[1]
    with pytest.raises(
        IncompatibleError, match=r"q_proj: the bank has linear 48 -> 32, the model has linear 32 -> 32"
    ):
        compose.attach(tiny_model("llama"), compose.Bank.open(tmp_path / "x"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "r",
    "init_r",
    "alpha",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "projection_prng_key",
    "save_projection",
    "target_modules",
    "modules_to_save",
    "bias",
    "layers_to_transform",
    "use_rslora",
    "use_new",
    "task_type",
]
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 8]), min_size=1, max_size=4).map(tuple)


@given(st.data(), st.sampled_from(sorted(KINDS)), st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3))
@settings(max_examples=600, deadline=None)
def test_any_configuration_and_any_shapes_are_read_or_refused(data, name, fields):
    kind = KINDS[name]
    parts = data.draw(st.dictionaries(st.sampled_from(sorted(kind.parts)), shapes, min_size=1))
    shared = data.draw(st.dictionaries(st.sampled_from(sorted(kind.shared or {"none"})), shapes))
    found = [{part: Found(part, shape, torch.float32) for part, shape in one.items()} for one in (parts, shared)]
    try:
        config = {"peft_type": "LORA" if name in ("DORA", "MERGED_LORA") else name, "r": 2, "init_r": 2, **fields}
        if name == "MERGED_LORA":
            config["enable_lora"] = data.draw(st.lists(st.booleans(), max_size=4) | json_values)
        target = kind.target(Opened(config, kind.parse(config), {"q": found[0]}, found[1], None), "q")
    except AdapterFormatError:
        return
    if target.factors is not None:
        a, b = target.factors({part: torch.ones(shape) for part, shape in (parts | shared).items()})
        assert (a.shape, b.shape) == ((target.rank, target.in_features), (target.out_features, target.rank))


REFUSED_AT_OPEN = {
    "dora": (
        lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        r"use_dora is set.*--base MODEL --rank R",
    ),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        r"peft_type 'IA3'.*compose convert .* --base MODEL --rank R",
    ),
    "loha": (
        lambda: peft.LoHaConfig(target_modules=["q_proj"], r=6),
        r"LoHa of rank 6 has rank 36, not below .*\(32\).*compose convert \S+ --out DIR --rank R",
    ),
    "lokr": (
        lambda: peft.LoKrConfig(target_modules=["q_proj"], r=64),
        r"LoKr with factors of ranks 4 and 8 .*compose convert \S+ --out DIR --rank R",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED_AT_OPEN))
def test_what_is_not_exactly_low_rank_names_the_next_step(case, tiny_model, tmp_path):
    config, message = REFUSED_AT_OPEN[case]
    build(peft, tiny_model("llama"), config(), tmp_path / "x")
    with pytest.raises(AdapterFormatError, match=message):
        compose.Bank.open(tmp_path / "x")
    edit(tmp_path / "x", base_model_name_or_path="some one/base")
    if "--base" in message:
        with pytest.raises(AdapterFormatError, match="--base 'some one/base'"):
            read_adapter(tmp_path / "x")


def test_kinds_lie_beside_each_other_in_a_bank_and_merge(tiny_model, run_model, tmp_path):
    small = {
        "lora": peft.LoraConfig(target_modules=ATTENTION, r=2),
        "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=9),
        "vera": peft.VeraConfig(target_modules=ATTENTION, r=6),
        "loha": peft.LoHaConfig(target_modules=LLAMA, r=2),
        "lokr": peft.LoKrConfig(target_modules=["v_proj"], r=1),
    }
    for seed, (name, config) in enumerate(small.items()):
        build(peft, tiny_model("llama"), config, tmp_path / "bank" / name, seed)
    bank = compose.Bank.open(tmp_path / "bank")
    assert bank.names == tuple(sorted(small))
    weights = {"lora": 0.5, "adalora": 0.25, "vera": -0.5, "loha": 1.0, "lokr": 0.3}
    merged = compose.merge(bank, "sum", weights)
    for path, update in merged.adapter.targets.items():
        parts = [weights[n] * bank[n].targets[path].delta() for n in bank.names if path in bank[n].targets]
        assert_close(update.delta(), sum(parts), rtol=1e-9, atol=1e-12)
    assert bank.stacks()["model.layers.0.self_attn.v_proj"].ranks == (0, 4, 4, 2, 6)
    again = bank["loha"]
    for path, update in read_adapter(tmp_path / "bank" / "loha").targets.items():
        assert_close(again.targets[path].delta(), update.delta(), rtol=0, atol=0)
    write_adapter(again, tmp_path / "written")
    assert read_adapter(tmp_path / "written").targets.keys() == again.targets.keys()


def test_a_changed_file_is_refused_after_it_was_inspected(tiny_model, tmp_path):
    folder = tmp_path / "x"
    build(peft, tiny_model("llama"), peft.LoHaConfig(target_modules=["q_proj"], r=2), folder)
    header = inspect_adapter(folder)
    read_adapter(folder, expected=header)
    retensor(folder, lambda tensors: tensors.update({"base_model.model.x.hada_w1_a": torch.ones(2, 2)}))
    with pytest.raises(AdapterFormatError, match="changed after it was inspected"):
        read_adapter(folder, expected=header)


Q = "base_model.model.model.layers.0.self_attn.q_proj."
SMALL = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], init_r=2, total_step=9),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=["q_proj"], r=1),
}
HOSTILE = {
    "adalora, missing": ("adalora", {Q + "lora_E": None}, {}, "lora_E missing"),
    "adalora, extra": ("adalora", {Q + "lora_C": (2, 2)}, {}, r"lora_C is no known LoRA tensor"),
    "adalora, shape": ("adalora", {Q + "lora_E": (3, 1)}, {}, r"do not fit together.*lora_E \(3, 1\)"),
    "adalora, rank": ("adalora", {}, {"init_r": 5}, "have rank 2, the configuration .* says 5"),
    "adalora, bias": ("adalora", {Q + "lora_B.bias": (32,)}, {}, "is a LoRA bias"),
    "adalora, mask": ("adalora", {}, {"rank_pattern": {"q.lora_E": [1, 0]}}, "lists of true and false"),
    "adalora, mask size": ("adalora", {}, {"rank_pattern": {"q.lora_E": [True]}}, "must have init_r = 2 entries"),
    "adalora, mask of none": ("adalora", {}, {"rank_pattern": {"q.lora_E": [True, True]}}, "rank_pattern names 'q'"),
    "adalora, alpha": ("adalora", {}, {"lora_alpha": 1e20}, "beyond the limit"),
    "adalora, init_r": ("adalora", {}, {"init_r": "2"}, "init_r must be a whole number"),
    "adalora, no inputs": ("adalora", {Q + "lora_A": (2, 0)}, {}, r"do not fit together: lora_A \(2, 0\)"),
    "adalora, no outputs": ("adalora", {Q + "lora_B": (0, 2)}, {}, r"do not fit together: .* lora_B \(0, 2\)"),
    "adalora, empty weight": (
        "adalora", {"base_model.model.lm_head.weight": (0,)}, {"modules_to_save": ["lm_head"]},
        r"lm_head.weight is empty \(a shard",
    ),
    "vera, missing": ("vera", {Q + "vera_lambda_d": None}, {}, "vera_lambda_b and vera_lambda_d are needed"),
    "vera, half": ("vera", {"base_model.vera_B": None}, {}, "vera_A is there alone"),
    "vera, shape": ("vera", {Q + "vera_lambda_d": (3,)}, {}, "do not fit together"),
    "vera, too narrow": ("vera", {"base_model.vera_B": (31, 2)}, {}, r"fit together: .*vera_B \(31, 2\)"),
    "vera, key": ("vera", {}, {"projection_prng_key": -1}, "projection_prng_key must be"),
    "loha, missing": ("loha", {Q + "hada_w2_b": None}, {}, "hada_w2_b missing"),
    "loha, extra": ("loha", {Q + "hada_w3_a": (2, 2)}, {}, "hada_w3_a belongs to LoHa, which is no part"),
    "loha, shape": ("loha", {Q + "hada_w2_a": (31, 2)}, {}, "do not fit together"),
    "loha, vector": ("loha", {Q + "hada_w2_a": (32,)}, {}, "hada_w2_a has shape .*convolutions"),
    "loha, half core": ("loha", {Q + "hada_t1": (2, 2, 1, 1)}, {}, "hada_t1 is there alone"),
    "loha, conv core": (
        "loha", {Q + "hada_t1": (2, 2, 3, 3), Q + "hada_t2": (2, 2, 3, 3)}, {}, r"hada_t1 has shape .*: a convolution",
    ),
    "loha, rank": ("loha", {}, {"r": 3}, r"rank 2, the configuration \(r, rank_pattern\) says 3"),
    "loha, alpha": ("loha", {}, {"alpha": "8"}, "alpha must be a finite number"),
    "loha, target": ("loha", {}, {"target_modules": ["q_proj", "v_proj"]}, "target_modules names 'v_proj', but no"),
    "loha, switch": ("loha", {}, {"use_new_thing": True}, "use_new_thing is set"),
    "loha, stray": ("loha", {"base_model.model.norm.weight": (3,)}, {}, r"norm\.weight is used by nothing"),
    "loha, of two": ("loha", {Q + "hada_w1_a.other": (32, 2)}, {}, "several adapters in one file"),
    "loha, nested": ("loha", {Q + "base_layer.hada_w1_a": (32, 2)}, {}, "is nested"),
    "lokr, missing": ("lokr", {Q + "lokr_w1": None}, {}, "lokr_w1_a, lokr_w1_b missing"),
    "lokr, both": ("lokr", {Q + "lokr_w2": (8, 8)}, {}, "lokr_w2_a.*is used by nothing"),
    "lokr, core": ("lokr", {Q + "lokr_t2": (1, 1, 3, 3)}, {}, "belongs to a convolution"),
    "lokr, shape": ("lokr", {Q + "lokr_w2_b": (2, 8)}, {}, "do not fit together"),
    "loha, empty": ("loha", {Q + "hada_w1_a": (0, 2)}, {}, "an empty tensor is a shard"),
    "lokr, bias": ("lokr", {}, {"bias": "all"}, "bias 'all'"),
    "wrong kind": ("loha", {}, {"peft_type": "LOKR"}, r"peft_type 'LOKR'.*hada_w1_a belongs to LoHa"),
    "unknown kind": ("loha", {}, {"peft_type": "BOFT"}, "peft_type 'BOFT' is not supported; supported are LORA"),
    "the name of DoRA": ("loha", {}, {"peft_type": "DORA"}, "peft_type 'DORA' is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_hostile_files_are_refused_by_name(case, tiny_model, tmp_path):
    kind, tensors, fields, message = HOSTILE[case]
    folder = tmp_path / "x"
    build(peft, tiny_model("llama"), SMALL[kind](), folder)
    read_adapter(folder)

    def change(content):
        for name, shape in tensors.items():
            content.pop(name, None)
            if shape is not None:
                content[name] = torch.ones(shape)

    retensor(folder, change)
    edit(folder, **fields)
    with pytest.raises(AdapterFormatError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_values_that_are_not_finite_are_refused(kind, tiny_model, tmp_path):
    folder = tmp_path / "x"
    build(peft, tiny_model("llama"), SMALL[kind](), folder)

    def poison(content):
        next(iter(content.values())).view(-1)[0] = float("nan")

    retensor(folder, poison)
    with pytest.raises(AdapterFormatError, match="not finite"):
        read_adapter(folder)


def test_products_that_overflow_are_refused(tmp_path):
    parts = {"w1_a": (5, 1), "w1_b": (1, 6), "w2_a": (5, 1), "w2_b": (1, 6)}
    tensors = {f"m.q.hada_{key}": torch.full(shape, 1e30) for key, shape in parts.items()}
    folder = write_raw(tmp_path / "x", tensors, peft_type="LOHA", r=1)
    with pytest.raises(AdapterFormatError, match=r"not finite .* m\.q"):
        read_adapter(folder)


def test_factors_larger_than_a_file_may_be_are_refused(tmp_path, monkeypatch):
    from compose.files import safetensors_file

    parts = {"w1_a": (20, 4), "w1_b": (4, 20), "w2_a": (20, 4), "w2_b": (4, 20)}
    folder = write_raw(
        tmp_path / "x", {f"m.q.hada_{key}": torch.ones(shape) for key, shape in parts.items()}, peft_type="LOHA", r=4
    )
    read_adapter(folder)
    monkeypatch.setattr(safetensors_file, "MAX_FILE_BYTES", 2500)
    with pytest.raises(AdapterFormatError, match=r"exact factors take 2,560 bytes.*compose convert"):
        inspect_adapter(folder)


def test_empty_tensors_are_allowed_in_adalora_alone(pruned, make_folder, tensors):
    empty = copy.copy(tensors)
    empty["base_model.model.m.layers.0.q.lora_A.weight"] = torch.ones(0, 6)
    with pytest.raises(AdapterFormatError, match="an empty tensor is a shard"):
        read_adapter(make_folder("x", empty))
    _, folder = pruned
    edit(folder, rank_pattern=None, init_r=1)
    with pytest.raises(AdapterFormatError, match=r"layers\.2\..* have rank 0"):
        read_adapter(folder)
