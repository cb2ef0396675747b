"""Converted folders stay while an adapter needs them, or may be about to."""

import os
from pathlib import Path

import torch

from compose.hub_index import Index
from compose.hub_index.converted import converted_folder, sweep_converted
from compose.hub_index.ingest import Options, add_tree
from tests.hub_index.folders import make, tensors


def test_what_no_adapter_needs_goes_when_it_is_old(tmp_path: Path) -> None:
    folder = make(tmp_path / "old")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors(), folder / "adapter_model.bin")
    with Index.open(tmp_path / "adapters.db", create=True) as index:
        assert sweep_converted(index) == []
        add_tree(index, folder, Options(allow_pickle=True))
        made = index.folder_of(index.get("old"))
        young = converted_folder(index.path) / "young"
        young.mkdir()
        os.utime(made, (0, 0))
        assert sweep_converted(index) == []
        index.remove(["old"])
        assert sweep_converted(index, dry_run=True) == [made.name]
        assert made.exists()
        assert sweep_converted(index) == [made.name]
        assert not made.exists()
        assert young.exists()
