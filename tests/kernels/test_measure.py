from __future__ import annotations

import json
import runpy

import pytest
import torch

from compose.kernels import measure, policy, policy_table

CELL = measure.Cell(batch=4, tokens=1, adapters=2, used=2, chosen=1, width=16, rank=4)


def work(tokens: int, rows: int) -> policy.Work:
    return policy.Work(tokens, tokens, 1, 4, 2, 2, rows, rows, tokens, tokens * 4, 0, 32, 4)


def test_a_fit_finds_the_constants_that_made_the_times():
    true = (5.0, 0.002, 0.01, 0.003, 0.0, 0.0, 0.0)
    shapes = [work(tokens, rows) for tokens in (4, 32, 100, 700) for rows in (2, 8, 90)]
    measured = [measure.Measured(CELL, w, {"stacked": policy.cost("stacked", w, true)}) for w in shapes]
    found = measure.fit(measured)["stacked"]
    for w in shapes:
        assert policy.cost("stacked", w, found) == pytest.approx(policy.cost("stacked", w, true), rel=0.01)


def test_regret_is_the_chosen_time_over_the_least():
    constants = {"stacked": (1.0,) + (0.0,) * 6, "segments": (2.0,) + (0.0,) * 7}
    measured = [measure.Measured(CELL, work(4, 8), {"stacked": 30.0, "segments": 20.0})]
    assert measure.regrets(measured, constants) == [1.5]
    lines = measure.report("grouped float32 inference", measured, constants)
    assert "stacked 30 *segments 20 regret 1.50" in lines[0]
    assert "1 cells, mean regret 50.0%, worst 1.50; wins {'stacked': 0, 'segments': 1}" in lines[1]


@pytest.mark.parametrize("op", ["grouped", "mixture"])
def test_the_grid_names_each_shape_once_and_holds_what_the_ops_meet(op):
    cells = list(measure.cells(op))
    assert len(cells) == len(set(cells))
    assert {cell.width for cell in cells} == {256, 512, 1024, 4096}
    assert any(cell.skewed for cell in cells)
    assert any(cell.used < cell.adapters for cell in cells)
    assert {cell.chosen for cell in cells} == ({1} if op == "grouped" else {1, 2})


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", ["grouped", "mixture"])
def test_every_strategy_of_a_cell_is_timed(op, training):
    found = measure.measure(op, CELL, torch.float32, training=training)
    assert set(found.times) == {"stacked", "rows", "segments", "grouped_mm", "padded", "bag"}
    assert min(found.times.values()) > 1.0
    assert found.work.adapters <= 2


def test_the_command_measures_a_section_and_stores_what_the_policy_reads(monkeypatch, tmp_path, capsys):
    table, cells = tmp_path / "policy_table.py", tmp_path / "cells.jsonl"
    monkeypatch.setattr(policy_table, "__file__", str(table))
    monkeypatch.setattr(measure, "cells", lambda op: [CELL, CELL._replace(width=32)])
    monkeypatch.setattr(policy, "multiplies_in_tiles", lambda: False)
    measure.main(["mixture bfloat16 inference", "--cells", str(cells)])
    costs = runpy.run_path(str(table))["COSTS"]
    assert set(costs) == set(policy_table.COSTS)
    assert costs["grouped float32 training"] == policy_table.COSTS["grouped float32 training"]
    assert costs["mixture bfloat16 inference"] != policy_table.COSTS["mixture bfloat16 inference"]
    assert "2 cells, mean regret" in capsys.readouterr().out
    assert [json.loads(line)[0] for line in cells.read_text().splitlines()] == ["mixture bfloat16 inference"] * 2


@pytest.mark.parametrize(
    ("tiles", "limit", "refused"),
    [(True, None, "bfloat16"), (True, "AVX512_CORE_BF16", "bfloat16_amx"), (False, None, "bfloat16_amx")],
    ids=["tiles", "tiles unused", "no tiles"],
)
def test_a_table_is_not_measured_on_a_cpu_it_is_not_for(monkeypatch, capsys, tiles, limit, refused):
    monkeypatch.setattr(policy, "multiplies_in_tiles", lambda: tiles)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    with pytest.raises(SystemExit):
        measure.main([f"grouped {refused} inference"])
    assert "cannot be measured" in capsys.readouterr().err


def test_an_unknown_section_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        measure.main(["grouped int8 inference"])
    assert "known: grouped float32 inference" in capsys.readouterr().err
