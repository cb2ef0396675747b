"""Banks opened from an index: which adapters, in which order, and never other bytes than the index knows."""

from pathlib import Path

import pytest
import safetensors.torch

import compose
from compose.errors import AdapterFormatError, HubIndexError, UnknownNameError
from compose.hub_index import AdapterRecord, Index
from compose.hub_index.ingest import Options, add_tree
from tests.hub_index.folders import CARD, make, tensors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An index of three adapters of one base, one of another, one in quarantine and one description."""
    tree = tmp_path / "bank"
    for seed, (name, text) in enumerate(
        {"sums": "Adds numbers.", "sorts": "Sorts words.", "caps": "Adds capitals."}.items()
    ):
        make(tree / name, seed, card=CARD.replace("Adds numbers.", text))
    make(tree / "other", 7, base_model_name_or_path="org/other")
    make(tree / "odd", 8, auto_mapping={"parent_library": "os"})
    with Index.open(tmp_path / "adapters.db", create=True) as index:
        add_tree(index, tree, Options())
        index.add(AdapterRecord(name="told", source="description", base_id="org/toy", summary="Adds numbers numbers."))
    return tmp_path / "adapters.db"


def test_a_query_opens_the_best_first(path: Path) -> None:
    bank = compose.Bank.from_index(path, query="adds numbers", base="org/toy")
    assert bank.names == ("sums", "caps")
    assert bank.base == "org/toy"
    assert "known by description alone" in bank.problems["told"]
    assert compose.Bank.from_index(path, query="adds numbers", base="org/toy", k=1).names == ("sums",)


def test_names_are_opened_in_their_order(path: Path) -> None:
    with Index.open(path, readonly=True) as index:
        bank = compose.Bank.from_index(index, names=["caps", "sums"])
        fingerprint = index.get("caps").base_fingerprint
        assert len(index) == 6  # still open
        assert bank.hashes["caps"] == index.get("caps").sha256_weights
    assert bank.names == ("caps", "sums")
    assert (
        bank["sums"].targets["m.layers.0.q"].a.tolist()
        == tensors(0)["base_model.model.m.layers.0.q.lora_A.weight"].tolist()
    )
    assert set(compose.Bank.from_index(path, base=fingerprint, names=["other"]).names) == {"other"}  # equal shapes


def test_a_base_opens_all_of_it(path: Path) -> None:
    assert compose.Bank.from_index(path, base="org/toy").names == ("caps", "sorts", "sums")
    assert compose.Bank.from_index(path, base="org/toy", k=2).names == ("caps", "sorts")
    assert compose.Bank.from_index(path, base="org/toy", quarantined=True).names == ("caps", "odd", "sorts", "sums")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": ["nobody"]}, UnknownNameError, "unknown adapter 'nobody'"),
        ({"names": ["odd"]}, HubIndexError, "is quarantined: config.import"),
        ({"names": ["told"]}, HubIndexError, "known by description alone"),
        ({"names": ["other"], "base": "org/toy"}, HubIndexError, "is of base model 'org/other'"),
        ({"names": ["sums"], "k": 2}, HubIndexError, "leave query and k out"),
        ({"k": 0}, HubIndexError, "k must be at least 1"),
        ({"base": "org/none"}, HubIndexError, "no active adapter of base model 'org/none'"),
        ({"query": "astronomy"}, HubIndexError, "no active adapter for 'astronomy'"),
        ({}, ValueError, "a bank has one base model"),
    ],
)
def test_what_cannot_be_is_told(path: Path, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        compose.Bank.from_index(path, **options)


def test_other_weights_than_the_index_knows_are_refused_at_their_first_read(path: Path, tmp_path: Path) -> None:
    bank = compose.Bank.from_index(path, names=["sums", "caps"])
    changed = tensors(99)
    safetensors.torch.save_file(changed, tmp_path / "bank" / "sums" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterFormatError, match="changed on disk"):
        bank.stacks()
    with pytest.raises(AdapterFormatError, match="changed on disk"):
        _ = compose.Bank.from_index(path, names=["sums"])["sums"]
    assert compose.Bank.open(tmp_path / "bank" / "sums")["sums"].targets  # the file itself is sound


def test_a_changed_configuration_and_missing_files_are_told_at_once(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "bank" / "sums" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    (tmp_path / "bank" / "caps" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFormatError, match="2 of 3 adapters cannot be loaded") as caught:
        compose.Bank.from_index(path, base="org/toy")
    assert "the index knows" in str(caught.value)
