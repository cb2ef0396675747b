"""Fingerprints of bases: a function of what an adapter touches, given back by a base model that it fits."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from compose.hub_index import Index, ModuleRecord
from compose.hub_index.audit import BaseModel
from compose.hub_index.fingerprint import base_fingerprint, fingerprint_in
from compose.hub_index.ingest import Options, add_tree
from tests.hub_index.folders import PREFIX, make

Q = ModuleRecord(name="m.q", in_features=6, out_features=5, rank=2)
V = ModuleRecord(name="m.v", in_features=6, out_features=4, rank=2)


def test_it_is_the_hash_of_sorted_shapes_and_the_model_type() -> None:
    text = '["llama", [["m.q", 6, 5], ["m.v", 6, 4]]]'
    assert base_fingerprint([V, Q], "llama") == hashlib.sha256(text.encode()).hexdigest()


def test_ranks_scalings_and_whole_weights_do_not_count() -> None:
    other = ModuleRecord(name="m.q", in_features=6, out_features=5, rank=8, scaling=3.0)
    head = ModuleRecord(name="head.weight", kind="full", in_features=6, out_features=9)
    vector = ModuleRecord(name="m.k", kind="vector", out_features=5)
    assert base_fingerprint([other, V, head, vector]) == base_fingerprint([Q, V])
    assert base_fingerprint([head, vector]) == ""


@pytest.mark.parametrize(
    "other",
    [
        [Q],
        [Q, ModuleRecord(name="m.v", in_features=7, out_features=4)],
        [Q, ModuleRecord(name="m.w", in_features=6, out_features=4)],
        [Q, ModuleRecord(name="m.v", in_features=4, out_features=6)],
    ],
)
def test_any_other_shape_or_name_is_another(other) -> None:
    assert base_fingerprint(other) != base_fingerprint([Q, V])
    assert base_fingerprint([Q, V], "llama") != base_fingerprint([Q, V], "gpt2")


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    layers = {"m.layers.0.q.weight": torch.ones(5, 6), "m.embed_tokens.weight": torch.ones(11, 6)}
    safetensors.torch.save_file(layers, folder / "model.safetensors")
    return BaseModel.open(folder)


def test_a_base_gives_the_fingerprint_of_what_fits_it(base) -> None:
    linear = ModuleRecord(name="m.layers.0.q", in_features=6, out_features=5)
    embedding = ModuleRecord(name="m.embed_tokens", kind="embedding", in_features=11, out_features=6)
    assert fingerprint_in(base, [embedding, linear]) == base_fingerprint([linear, embedding], "llama")
    wide = ModuleRecord(name="m.layers.0.q", in_features=7, out_features=5)
    assert fingerprint_in(base, [wide]) != base_fingerprint([wide], "llama")
    assert fingerprint_in(base, [ModuleRecord(name="m.none", in_features=6, out_features=5)]) == ""


def test_adapted_embeddings_fit_their_base(base, tmp_path) -> None:
    content = {
        f"{PREFIX}m.embed_tokens.lora_embedding_A": torch.ones(2, 11),
        f"{PREFIX}m.embed_tokens.lora_embedding_B": torch.ones(6, 2),
        f"{PREFIX}m.layers.0.q.lora_A.weight": torch.ones(2, 6),
        f"{PREFIX}m.layers.0.q.lora_B.weight": torch.ones(5, 2),
    }
    folder = make(tmp_path / "x", content=content, target_modules=["q", "embed_tokens"])
    with Index.open(tmp_path / "adapters.db", create=True) as index:
        (outcome,) = add_tree(index, folder, Options(base=base))
        assert (outcome.state, outcome.reasons) == ("active", ())
