"""Files hashed again: what is missing, what changed, and what has no files."""

from pathlib import Path

import pytest

from compose.errors import UnknownNameError
from compose.hub_index import AdapterRecord, Index
from compose.hub_index.ingest import Options, add_tree
from compose.hub_index.verify import verify
from tests.hub_index.folders import make


@pytest.fixture
def index(tmp_path: Path):
    for seed, name in enumerate(("a", "b", "c", "d")):
        make(tmp_path / "bank" / name, seed)
    with Index.open(tmp_path / "adapters.db", create=True) as opened:
        add_tree(opened, tmp_path / "bank", Options())
        opened.add(AdapterRecord(name="told", source="description"))
        yield opened


def test_untouched_files_are_ok(index: Index) -> None:
    assert {one.name: one.state for one in verify(index)} == {
        "a": "ok", "b": "ok", "c": "ok", "d": "ok", "told": "description",
    }  # fmt: skip


def test_one_byte_is_seen_and_what_is_gone_is_missing(index: Index, tmp_path: Path) -> None:
    weights = tmp_path / "bank" / "a" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = tmp_path / "bank" / "b" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    (tmp_path / "bank" / "c" / "adapter_model.safetensors").unlink()
    seen = []
    found = {one.name: one for one in verify(index, on_adapter=seen.append)}
    assert [found[name].state for name in "abcd"] == ["changed", "changed", "missing", "ok"]
    assert str(weights) in found["a"].detail
    assert "adapter_config.json has SHA-256" in found["b"].detail
    assert [one.name for one in seen] == ["a", "b", "c", "d", "told"]
    index.remove(["a"])
    assert "a" not in {one.name for one in verify(index)}


def test_names_choose(index: Index) -> None:
    assert [one.name for one in verify(index, ["c", "a", "c"])] == ["c", "a"]
    with pytest.raises(UnknownNameError):
        verify(index, ["x"])
