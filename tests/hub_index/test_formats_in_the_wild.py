"""Every format people have uploaded: taken in, quarantined with the way to convert it, or refused by name."""

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import compose
from compose.formats import FORMATS
from compose.hub_index import Index
from compose.hub_index.ingest import Options, add_tree
from compose.hub_index.verify import verify
from tests.formats.peft_models import LLAMA, build
from tests.hub_index.folders import PREFIX, make, tensors

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

QV = {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "org/base"}
SAVED_BY_PEFT = {
    "lora": ("llama", lambda: peft.LoraConfig(r=2, **QV), "active", "linear"),
    "rslora": ("llama", lambda: peft.LoraConfig(r=4, use_rslora=True, **QV), "active", "linear"),
    "patterns": ("llama", lambda: peft.LoraConfig(r=2, rank_pattern={"q_proj": 3}, **QV), "active", "linear"),
    "regex": ("llama", lambda: peft.LoraConfig(r=2, **{**QV, "target_modules": r".*\.q_proj"}), "active", "linear"),
    "a word": ("llama", lambda: peft.LoraConfig(r=2, **{**QV, "target_modules": "all-linear"}), "active", "linear"),
    "conv1d": (
        "gpt2", lambda: peft.LoraConfig(r=2, **{**QV, "target_modules": ["c_attn"]}, fan_in_fan_out=True), "active",
        "linear",
    ),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=3, total_step=9, **QV), "active", "linear"),
    "vera": ("llama", lambda: peft.VeraConfig(r=3, **{**QV, "target_modules": ["v_proj"]}), "active", "linear"),
    "vera, drawn": ("llama", lambda: peft.VeraConfig(r=3, save_projection=False, **QV), "quarantined", "linear"),
    "loha": ("llama", lambda: peft.LoHaConfig(r=2, **{**QV, "target_modules": LLAMA}), "active", "linear"),
    "loha, large": ("llama", lambda: peft.LoHaConfig(r=6, **QV), "quarantined", "linear"),
    "lokr": ("llama", lambda: peft.LoKrConfig(r=1, **QV), "active", "linear"),
    "lokr, large": ("llama", lambda: peft.LoKrConfig(r=64, **QV), "quarantined", "linear"),
    "dora": ("llama", lambda: peft.LoraConfig(r=2, use_dora=True, **QV), "quarantined", "linear"),
    "ia3": (
        "llama",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
            base_model_name_or_path="org/base",
        ),
        "quarantined", "vector",
    ),
}  # fmt: skip


@pytest.fixture
def index(tmp_path: Path):
    with Index.open(tmp_path / "adapters.db", create=True) as opened:
        yield opened


def add(index: Index, folder: Path, **options):
    (outcome,) = add_tree(index, folder, Options(**options))
    return outcome


def base_id(folder: Path) -> None:
    """PEFT writes the name of the model object, which a tiny random one has not."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/base"}))


@pytest.mark.parametrize("case", sorted(SAVED_BY_PEFT))
def test_what_peft_saves_is_active_or_quarantined(case, index: Index, tiny_model, tmp_path: Path) -> None:
    name, config, state, kind = SAVED_BY_PEFT[case]
    build(peft, tiny_model(name), config(), tmp_path / "x")
    base_id(tmp_path / "x")
    outcome = add(index, tmp_path / "x")
    assert (outcome.state, outcome.code) == (state, ""), outcome.reasons
    record = index.get("x")
    assert {one.kind for one in record.modules} == {kind}
    assert record.base_id == "org/base"
    if state == "active":
        opened = compose.Bank.open(tmp_path / "x").shapes("x")
        assert {one.name: (one.rank, one.scaling) for one in record.modules} == {
            path: (shape.rank, shape.scaling) for path, shape in opened.items()
        }
    else:
        assert "compose convert" in record.reasons[0]
    assert ("dora" in record.flags, "rslora" in record.flags) == (case == "dora", case == "rslora")


def infix(content):
    return {
        key.replace(".weight", ".default.weight").replace(PREFIX, "base_model.model."): one
        for key, one in content.items()
    }


HAND_MADE = {
    "a raw dump with .default.": ({"content": infix(tensors())}, "active", ""),
    "no prefix": ({"content": tensors(prefix="")}, "active", ""),
    "compiled and distributed": ({"content": tensors(prefix="module._orig_mod.base_model.model.")}, "active", ""),
    "a bare target": ({"target_modules": "q"}, "active", ""),
    "14 fields of 2023": (
        {"bias": "none", "enable_lora": None, "fan_in_fan_out": False, "merge_weights": False, "lora_dropout": 0.0},
        "active", "",
    ),
    "fields of tomorrow": ({"some_new_number": 3}, "active", ""),
    "a variant of tomorrow": ({"use_new_lora": True}, "refused", "format"),
    "copies of the base": (
        {"content": {**tensors(), f"{PREFIX}m.layers.0.q.base_layer.weight": torch.ones(5, 6)}}, "refused",
        "tensors.foreign",
    ),
    "kohya's names": (
        {"content": {f"{PREFIX}q.lora_down.weight": torch.ones(2, 6), f"{PREFIX}q.lora_up.weight": torch.ones(5, 2)}},
        "refused", "tensors.foreign",
    ),
    "two adapters": ({"content": {**infix(tensors()), **tensors()}}, "refused", "format"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "refused", "config.kind"),
    "biases of the base": ({"bias": "all"}, "refused", "format"),
    "another start": ({"init_lora_weights": "pissa"}, "refused", "format"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(HAND_MADE))
def test_files_by_hand_and_by_older_releases(case, index: Index, tmp_path: Path) -> None:
    options, state, code = HAND_MADE[case]
    outcome = add(index, make(tmp_path / "x", **options))
    assert (outcome.state, outcome.code) == (state, code), outcome.reasons
    if state == "active":
        assert len(compose.Bank.open(tmp_path / "x").targets) == 4
    else:
        assert len(index) == 0
        assert len(outcome.reasons[0].rpartition("x")[2]) > 20  # a reason, not only a path


def test_fused_lora_of_2023_is_active(index: Index, tmp_path: Path) -> None:
    content = {
        f"{PREFIX}h.0.c_attn.lora_A.weight": torch.ones(4, 6),
        f"{PREFIX}h.0.c_attn.lora_B.weight": torch.ones(10, 2, 1),
    }
    config = {"enable_lora": [True, False, True], "fan_in_fan_out": True, "target_modules": ["c_attn"]}
    assert add(index, make(tmp_path / "x", content=content, **config)).state == "active"
    record = index.get("x")
    assert (record.format, record.flags) == ("peft-legacy-merged", ("fan_in_fan_out", "fused"))
    assert [(one.rank, one.in_features, one.out_features) for one in record.modules] == [(4, 6, 15)]


def test_compeft_is_active_and_verified(index: Index, tmp_path: Path) -> None:
    adapter = compose.read_adapter(make(tmp_path / "plain"))
    FORMATS["compeft"].write(adapter, tmp_path / "small")
    assert add(index, tmp_path / "small").state == "active"
    record = index.get("small")
    assert (record.format, record.rank_max, len(record.modules)) == ("compeft", 2, 4)
    assert [one.state for one in verify(index)] == ["ok"]
    assert compose.Bank.from_index(index, names=["small"])["small"].targets


def test_adapted_embeddings_with_their_copies_need_leave(index: Index, tiny_model, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    build(peft, tiny_model("llama"), config, tmp_path / "x")
    base_id(tmp_path / "x")
    assert add(index, tmp_path / "x").code == "tensors.foreign"
    assert add(index, tmp_path / "x", full_modules=True).state == "active"
    kinds = {one.name: one.kind for one in index.get("x").modules}
    assert kinds["model.embed_tokens"] == "embedding"


class Experts(nn.Module):
    """Fused experts, as mixtures in transformers 5 keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio->beo", x, self.up)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


def test_lora_on_fused_experts_is_refused_by_name(index: Index, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"])
        peft.get_peft_model(Mixture(), config).save_pretrained(tmp_path / "x")
    saved = safetensors.torch.load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert "base_model.model.experts.lora_A.weight" in saved
    base_id(tmp_path / "x")
    outcome = add(index, tmp_path / "x")
    assert outcome.state == "refused"
    assert "target_parameters is set: LoRA on bare parameters" in outcome.reasons[0]
