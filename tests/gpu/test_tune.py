"""The tuner on a GPU: one trial, a real clock, a table in a temporary folder."""

from __future__ import annotations

import json

import pytest
import torch

from compose.kernels import tune as tuner
from compose.kernels.packed import search, tables, trials, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


def test_a_table_is_measured_written_and_used(monkeypatch):
    space = search.Space(({"splits": (8, 16)}, {"bn": (256, 512)}), ("splits",))
    monkeypatch.setattr(trials, "space", lambda trial, dtype: space)
    path = tuner.tune(names=["rows-r16"])
    assert path == tables.cache_folder() / tables.file_name(torch.cuda.get_device_name())
    (entry,) = json.loads(path.read_text())["entries"]
    assert all(0.5 < one < 100 for candidate in entry["candidates"] for one in candidate["us"])
    used = tuning.rows_config(torch.bfloat16, torch.device("cuda", 0), 4096, 4096, 16, 16, 1)
    assert used._asdict() == entry["config"]


def test_nothing_is_tuned_while_a_graph_is_captured():
    graph, held = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            tuner.tune(names=["rows-r16"])
        held.add_(1)
    graph.replay()
    assert held.item() == 1
    assert not tables.cache_folder().exists()
