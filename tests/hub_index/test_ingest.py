"""Adapters taken in: what the record says, what quarantines, what refuses, and that nothing lands half."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from compose.errors import HubIndexError
from compose.hub_index import Index
from compose.hub_index.audit.base_model import BaseModel
from compose.hub_index.converted import converted_folder
from compose.hub_index.fingerprint import base_fingerprint
from compose.hub_index.ingest import Options, add_tree
from tests.hub_index.folders import CARD, PREFIX, make, tensors


@pytest.fixture
def index(tmp_path: Path):
    with Index.open(tmp_path / "index" / "adapters.db", create=True) as opened:
        yield opened


def add(index: Index, folder: Path, **options):
    (outcome,) = add_tree(index, folder, Options(**options))
    return outcome


def test_the_record_says_what_the_files_say(index: Index, tmp_path: Path) -> None:
    folder = make(tmp_path / "sums", alpha_pattern={"layers.1.v": 8}, revision="abc", metadata={"note": "hello"})
    assert add(index, folder)[:2] == ("sums", "active")
    record = index.get("sums")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    config = (folder / "adapter_config.json").read_bytes()
    assert record.sha256_weights == hashlib.sha256(weights).hexdigest()
    assert record.sha256_config == hashlib.sha256(config).hexdigest()
    assert (record.source, record.path, record.format) == ("dir", str(folder), "peft-safetensors")
    assert (record.num_bytes, record.num_tensors, record.num_params, record.dtype) == (len(weights), 8, 88, "F32")
    assert (record.base_id, record.base_revision, record.peft_type) == ("org/toy", "abc", "LORA")
    assert (record.rank_min, record.rank_max) == (2, 2)
    assert record.scaling == {"*": 2.0, "m.layers.1.v": 4.0}
    assert (record.title, record.summary, record.license, record.tags) == ("Sums", "Adds numbers.", "mit", ("sums",))
    assert record.hyper == {"safetensors_metadata": {"note": "hello"}}
    assert [(one.name, one.in_features, one.out_features, one.rank) for one in record.modules][:2] == [
        ("m.layers.0.q", 6, 5, 2),
        ("m.layers.0.v", 6, 5, 2),
    ]
    assert record.base_fingerprint == base_fingerprint(record.modules)
    assert [hit.adapter.name for hit in index.query("numbers")] == ["sums"]


def test_the_same_content_is_present_and_another_of_the_name_is_refused(index: Index, tmp_path: Path) -> None:
    folder = make(tmp_path / "one" / "sums")
    add(index, folder)
    again = add(index, make(tmp_path / "two" / "plus"))
    assert again[:2] == ("sums", "present")
    other = add(index, make(tmp_path / "three" / "sums", seed=1))
    assert (other.state, other.code) == ("refused", "name_taken")
    replaced = add(index, tmp_path / "three" / "sums", replace=True)
    assert replaced.state == "active"
    assert len(index) == 1


def test_a_tree_is_walked_and_every_adapter_told(index: Index, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make(tree / "a" / "adapter", 0)
    make(tree / "b" / "adapter", 1)
    make(tree / "b" / "adapter" / "checkpoint-9", 2)
    make(tree / ".hidden" / "x", 3)
    make(tree / "zero", content={key: torch.zeros_like(one) for key, one in tensors().items()})
    make(tree / "bad", r=3)
    (tree / "notes").mkdir()
    seen = []
    outcomes = add_tree(index, tree, Options(), on_adapter=seen.append)
    assert seen == outcomes
    assert [(one.name, one.state, one.code) for one in outcomes] == [
        ("a.adapter", "active", ""),
        ("b.adapter", "active", ""),
        ("checkpoint-9", "active", ""),
        ("bad", "refused", "format"),
        ("zero", "quarantined", ""),
    ]
    assert "values.zero: the update of all 4 modules is zero" in outcomes[-1].reasons
    assert [one.name for one in index.ls()] == ["a.adapter", "b.adapter", "checkpoint-9"]


def test_links_inside_are_followed_and_links_out_refused(index: Index, tmp_path: Path) -> None:
    inside = make(tmp_path / "tree" / "inside")
    blob = inside / "blob"
    (inside / "adapter_model.safetensors").rename(blob)
    (inside / "adapter_model.safetensors").symlink_to(blob)
    outside = make(tmp_path / "tree" / "outside", 1)
    secret = tmp_path / "secret"
    (outside / "adapter_model.safetensors").rename(secret)
    (outside / "adapter_model.safetensors").symlink_to(secret)
    (tmp_path / "tree" / "way-out").symlink_to(tmp_path, target_is_directory=True)
    states = {one.name: (one.state, one.code) for one in add_tree(index, tmp_path / "tree", Options())}
    assert states == {"inside": ("active", ""), "outside": ("refused", "link"), "way-out": ("refused", "link")}


def test_a_pipe_does_not_hang(index: Index, tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    assert add(index, folder)[1::3] == ("refused", "special")


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 83900000\n")


def image(folder: Path, name: str, key: str, metadata=None) -> None:
    folder.mkdir()
    safetensors.torch.save_file({key: torch.ones(2, 2)}, folder / name, metadata=metadata)


def damage(folder: Path, kind: str) -> None:
    """Make ``folder`` one of the things that look like an adapter."""
    match kind:
        case "pointer":
            lfs(make(folder) / "adapter_model.safetensors")
        case "config_only":
            (make(folder) / "adapter_model.safetensors").unlink()
        case "weights_only":
            (make(folder) / "adapter_config.json").unlink()
        case "pickle":
            (make(folder) / "adapter_model.safetensors").unlink()
            torch.save(tensors(), folder / "adapter_model.bin")
        case "diffusers":
            image(folder, "pytorch_lora_weights.safetensors", "unet.down.to_q.lora.down.weight")
        case "kohya":
            image(folder, "style.safetensors", "lora_unet_down.lora_down.weight", {"ss_base_model_version": "sdxl"})
        case "mttl":
            folder.mkdir()
            (folder / "x.meta").write_bytes(b"")
            (folder / "x.ckpt").write_bytes(b"")
        case "unknown":
            image(folder, "other.safetensors", "layer.weight")


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        ("pointer", r"83.9 MB not downloaded\). Run: git lfs pull"),
        ("config_only", "Run: hf download REPO"),
        ("weights_only", "save again with peft"),
        ("pickle", "add it with --allow-pickle"),
        ("diffusers", "pipe.load_lora_weights"),
        ("kohya", "LoRA of an image model for 'sdxl' .kohya"),
        ("mttl", "load them with mttl where you trust them"),
        ("unknown", "a PEFT folder has adapter_config.json"),
    ],
)
def test_what_only_looks_like_an_adapter_is_refused_with_the_next_step(kind, step, index: Index, tmp_path) -> None:
    damage(tmp_path / "x", kind)
    outcome = add(index, tmp_path / "x")
    assert (outcome.state, outcome.code) == ("refused", kind)
    with pytest.raises(ValueError, match=step):
        raise ValueError(outcome.reasons[0])
    assert len(index) == 0


def test_pickled_weights_are_converted_where_asked_for(index: Index, tmp_path: Path) -> None:
    damage(tmp_path / "old", "pickle")
    outcome = add(index, tmp_path / "old", allow_pickle=True)
    assert outcome[:2] == ("old", "active")
    record = index.get("old")
    folder = index.folder_of(record)
    assert (record.format, folder.parent) == ("peft-bin", converted_folder(index.path))
    assert not Path(record.path).is_absolute()
    digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert record.sha256_weights == digest
    assert record.license == "mit"  # the card stands beside the pickle
    pickled = hashlib.sha256((tmp_path / "old" / "adapter_model.bin").read_bytes()).hexdigest()
    assert any(pickled in one.detail for one in record.findings)


def test_values_that_are_not_finite_refuse(index: Index, tmp_path: Path) -> None:
    content = tensors()
    next(iter(content.values()))[0, 0] = float("nan")
    assert add(index, make(tmp_path / "x", content=content))[1::3] == ("refused", "values.finite")


def test_whole_modules_need_leave(index: Index, tmp_path: Path) -> None:
    content = {**tensors(), PREFIX + "head.weight": torch.ones(3, 6)}
    folder = make(tmp_path / "x", content=content, modules_to_save=["head"])
    refused = add(index, folder)
    assert (refused.state, refused.code) == ("refused", "tensors.foreign")
    assert "--allow-full-modules" in refused.reasons[0]
    assert add(index, folder, full_modules=True).state == "active"
    record = index.get("x")
    assert (record.modules_to_save, record.flags) == (("head.weight",), ("full_modules",))


def test_an_unnamed_base_quarantines(index: Index, tmp_path: Path) -> None:
    outcome = add(index, make(tmp_path / "x", base_model_name_or_path=None))
    assert outcome.state == "quarantined"
    assert "--base MODEL --replace" in outcome.reasons[0]
    named = CARD.replace("license: mit", "license: mit\nbase_model: org/carded")
    assert add(index, make(tmp_path / "y", 1, base_model_name_or_path=None, card=named)).state == "active"
    assert index.get("y").base_id == "org/carded"


def test_a_local_or_bare_base_is_kept_and_noted(index: Index, tmp_path: Path) -> None:
    outcome = add(index, make(tmp_path / "x", base_model_name_or_path="./models/llama"))
    assert outcome.state == "active"
    assert any("'./models/llama', not owner/name" in note for note in outcome.notes)
    assert index.get("x").base_id == "./models/llama"


def test_severe_findings_quarantine_from_the_level_asked_for(index: Index, tmp_path: Path) -> None:
    folder = make(tmp_path / "x", auto_mapping={"parent_library": "os"})
    outcome = add(index, folder)
    assert (outcome.state, outcome.reasons[0].partition(":")[0]) == ("quarantined", "config.import")
    assert add(index, folder, quarantine_at="critical", replace=True).state == "active"


def base_of(folder: Path, width: int = 6) -> BaseModel:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    layers = {f"m.layers.{layer}.{target}.weight": torch.ones(5, width) for layer in range(2) for target in "qv"}
    safetensors.torch.save_file(layers, folder / "model.safetensors")
    return BaseModel.open(folder)


def test_a_base_that_fits_is_told_and_one_that_does_not_refuses(index: Index, tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    wrong = add(index, folder, base=base_of(tmp_path / "wide", 7))
    assert (wrong.state, wrong.code) == ("refused", "base.shape")
    assert "m.layers.0.q is 6 -> 5, in the base model 7 -> 5" in wrong.reasons[0]
    assert add(index, folder, base=base_of(tmp_path / "toy")).state == "active"
    record = index.get("x")
    assert record.base_fingerprint == base_fingerprint(record.modules, "llama") != base_fingerprint(record.modules)


def test_lineage_is_read_from_a_merge(index: Index, tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    parents = [{"name": "a", "sha256": "0" * 64, "weight": 0.25}, {"name": "b", "sha256": "no", "weight": 1}]
    (folder / "merge.json").write_text(json.dumps({"method": "ties", "parents": parents}))
    add(index, folder)
    (parent,) = index.get("x").parents
    assert (parent.parent_sha256, parent.weight, parent.method) == ("0" * 64, 0.25, "ties")


def test_names_that_no_adapter_may_have_become_near_ones(index: Index, tmp_path: Path) -> None:
    assert add(index, make(tmp_path / "-my adapter (2)")).name == "my-adapter-2-"
    outcome = add(index, make(tmp_path / "日本", 1))
    assert (outcome.state, outcome.code) == ("refused", "name")
    (named,) = add_tree(index, tmp_path / "日本", Options(), name="japan")
    assert named[:2] == ("japan", "active")


def test_there_has_to_be_an_adapter(index: Index, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubIndexError, match="no adapter in it"):
        add_tree(index, tmp_path / "empty", Options())
    with pytest.raises(HubIndexError, match="no such folder"):
        add_tree(index, tmp_path / "none", Options())
    make(tmp_path / "two" / "a")
    make(tmp_path / "two" / "b", 1)
    with pytest.raises(HubIndexError, match="--name names one adapter"):
        add_tree(index, tmp_path / "two", Options(), name="x")
