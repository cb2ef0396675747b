"""Adapters against the headers of a base model's checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compose.adapter import Adapter, LowRank
from compose.errors import IncompatibleError
from compose.formats.peft import write_adapter
from compose.hub_index.audit.base_model import BaseModel
from compose.hub_index.fingerprint import base_fingerprint
from compose.hub_index.records import AdapterRecord, ModuleRecord

PARTS = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv"]


@pytest.fixture
def base(tmp_path: Path):
    """Write a checkpoint with these matrices and open it."""

    def write(weights: dict[str, torch.Tensor], kind: str = "llama", name: str = "base") -> BaseModel:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        save_file({f"{path}.weight": value for path, value in weights.items()}, folder / "model.safetensors")
        return BaseModel.open(folder)

    return write


def matrices(out: int = 12, wide: int = 10, size: float = 10.0) -> dict[str, torch.Tensor]:
    return {path: torch.full((out, wide), size, dtype=torch.bfloat16) for path in PARTS}


def test_the_right_base_has_no_finding(make, rules, base) -> None:
    assert rules(make(), base=base(matrices())) == set()


def test_another_base_is_seen_by_its_shapes(make, findings, base) -> None:
    found = findings(make(), "base.shape", base=base(matrices(out=16)))
    assert [one.module for one in found] == PARTS
    assert "10 -> 12, in the base model 10 -> 16" in found[0].detail


def test_targets_that_the_base_does_not_have(make, findings, base) -> None:
    found = findings(make(), "base.module", base=base(dict(list(matrices().items())[:2])))
    assert [one.module for one in found] == PARTS[2:]


def test_layers_that_the_names_mean_and_the_file_lacks(make, edit, findings, base) -> None:
    more = {**matrices(), "model.layers.2.self_attn.q_proj": torch.ones(12, 10)}
    model = base(more)
    folder = edit(make(), target_modules=["q_proj", "v_proj"])
    assert [one.module for one in findings(folder, "base.missing", base=model)] == ["model.layers.2.self_attn.q_proj"]
    assert findings(edit(folder, layers_to_transform=[0, 1]), "base.missing", base=model) == []


def test_updates_larger_than_the_weight(make, rules, base) -> None:
    assert "base.norm" in rules(make(), base=base(matrices(size=0.01)))


def test_norms_are_those_of_the_bytes(base) -> None:
    weights = {"model.layers.0.self_attn.q_proj": torch.randn(6, 4).to(torch.bfloat16)}
    found = base(weights).norm("model.layers.0.self_attn.q_proj")
    assert found == pytest.approx(float(next(iter(weights.values())).double().norm()), rel=1e-12)


def test_paths_with_and_without_a_leading_part(base) -> None:
    model = base({"h.0.attn.c_attn": torch.zeros(8, 24), "wte": torch.zeros(30, 8)}, kind="gpt2")
    found = model.find("transformer.h.0.attn.c_attn")
    assert found is not None
    assert (found.out_features, found.in_features) == (24, 8)  # GPT-2 keeps (in, out)
    tied = model.find("lm_head")
    assert tied is not None
    assert (tied.out_features, tied.in_features) == (30, 8)
    assert model.find("transformer.h.1.attn.c_attn") is None
    longer = base({"model.decoder.layers.0.fc1": torch.zeros(5, 3)}, name="longer")
    assert longer.find("decoder.layers.0.fc1") is not None


def test_a_tiny_model_is_found_path_by_path(tiny_model, tmp_path: Path) -> None:
    for name in ("llama", "t5"):
        model = tiny_model(name)
        model.save_pretrained(tmp_path / name)
        base = BaseModel.open(tmp_path / name)
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                layer = base.find(path)
                assert layer is not None, (name, path)
                assert (layer.out_features, layer.in_features) == tuple(module.weight.shape)


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="neither a folder nor in the cache"):
        BaseModel.open("nobody/no-such-model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IncompatibleError, match=r"no model\.safetensors"):
        BaseModel.open(tmp_path)


def test_embeddings_are_compared_the_right_way_round(base, tmp_path: Path, rules) -> None:
    update = LowRank(torch.randn(2, 30), torch.randn(8, 2), 1.0, "embedding")
    folder = write_adapter(Adapter("one", "owner/base", {"model.embed_tokens": update}), tmp_path / "one")
    right = base({"model.embed_tokens": torch.full((30, 8), 9.0)})
    assert {rule for rule in rules(folder, base=right) if rule.startswith("base.")} == set()
    assert "base.shape" in rules(folder, base=base({"model.embed_tokens": torch.ones(8, 30)}, name="turned"))


def test_fingerprints(make, findings, base) -> None:
    folder = make()
    modules = tuple(ModuleRecord(name=path, in_features=10, out_features=12, rank=3) for path in PARTS)
    own, typed = base_fingerprint(modules), base_fingerprint(modules, "llama")
    assert findings(folder, "base.fingerprint", fingerprint=own) == []
    assert findings(folder, "base.fingerprint", fingerprint=typed) != []
    known = AdapterRecord(name="one", sha256_weights="0" * 64, base_fingerprint=typed, modules=modules)
    assert findings(folder, "base.fingerprint", fingerprint=typed, record=known) == []
    assert findings(folder, "base.fingerprint", base=base(matrices()), record=known) == []
    other = base(matrices(), kind="mistral", name="other")
    assert findings(folder, "base.fingerprint", base=other, record=known) != []
