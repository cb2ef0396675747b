"""The benchmark of paged banks in its smoke form: a tiny model on a CPU, everything but the clock."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compose.engine.paging_table import SlotTable

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke form runs on the CPU")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of ``benchmarks/gpu``, importable while these tests run."""
    pytest.importorskip("triton")
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"gpu.{name}") for name in ("paging", "paging_bank")})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            found = getattr(sys.modules[name], "__file__", None)
            if found and BENCHMARKS in Path(found).parents:
                del sys.modules[name]


@pytest.fixture
def load(bench: SimpleNamespace):
    return bench.paging.Load(adapters=20, rows=3, steps=2, warm=4, batches=5, exponent=1.1)


def test_every_mode_gives_a_record_with_ratios(bench: SimpleNamespace, load) -> None:
    with torch.no_grad():
        records = list(bench.paging.run_modes(load, [4, 10], "cpu", "cpu", smoke=True))
    modes = ["set-up", "base", "resident", "wait", "prefetch", "wait", "prefetch"]
    assert [record["mode"] for record in records] == modes
    for record in records[2:]:
        json.dumps(record)
        assert record["gate"] == "ok"
        assert record["hits"] + record["prefetched"] + record["misses"] > 0
        assert record["bytes"] == record["loads"] * records[0]["bytes_per_adapter"]
        assert bench.paging.format_record(record)
    resident, few, _, more, ahead = records[2:]
    assert resident["hit_rate"] == 1.0
    assert few["loads"] >= more["loads"] > 0
    assert ahead["prefetched"] > 0


def test_a_wrong_slot_makes_a_mode_red(bench: SimpleNamespace, load, monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters in slots stay right here, for their first slots are never moved."""
    slot = SlotTable.slot
    monkeypatch.setattr(SlotTable, "slot", lambda self, name: slot(self, name) ^ (len(self.capacities) == 4))
    with torch.no_grad():
        records = list(bench.paging.run_modes(load, [4], "cpu", "cpu", smoke=True))
    assert [record.get("gate") for record in records] == [None, None, "ok", "red", "red"]


def test_batches_follow_zipf_s_law(bench: SimpleNamespace) -> None:
    load = bench.paging.Load(adapters=50, rows=32, steps=1, warm=0, batches=400, exponent=1.1)
    names = tuple(f"adapter-{number}" for number in range(50))
    batches = bench.paging.draw_batches(names, load)
    assert [len(rows) for rows in batches] == [32] * 400
    counts = sorted((sum(rows.count(name) for rows in batches) for name in names), reverse=True)
    total = sum(number**-1.1 for number in range(1, 51))
    for place in (1, 2, 5):
        assert counts[place - 1] / 12800 == pytest.approx(place**-1.1 / total, rel=0.1)


def test_an_entry_reads_what_its_page_holds(bench: SimpleNamespace) -> None:
    from gpu.llama_model import QV, TINY, build_model

    bank = bench.paging_bank.random_bank(build_model(TINY, "cpu"), QV, 3, 2, "cpu")
    entry = bank._entries["adapter-1"]
    update = bank["adapter-1"].targets["model.layers.0.self_attn.q_proj"]
    rows, scaling_G, ranks_G = entry.layout.views(entry.buffer)
    assert torch.equal(update.a, rows[0].a_rD)
    assert update.a.std() > 0
    assert scaling_G.tolist() == [2.0] * 4
    assert ranks_G.tolist() == [2] * 4
