"""The GPU benchmark in its smoke form: everything but the clock, on a CPU, kernels interpreted."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
BACKEND = "cpu"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke form interprets kernels on the CPU")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of ``benchmarks/gpu``, importable while these tests run."""
    pytest.importorskip("triton")
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("ops", "cases", "measure", "baselines", "training", "operands", "gate", "graph_timing", "yardsticks")
        yield SimpleNamespace(**{name: importlib.import_module(f"gpu.{name}") for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            found = getattr(sys.modules[name], "__file__", None)
            if found and BENCHMARKS in Path(found).parents:
                del sys.modules[name]


@pytest.fixture
def settings(bench: SimpleNamespace):
    return bench.measure.Settings("cpu", torch.float32, BACKEND, 1)


NAMES = (
    "t1", "t32-e32", "t128-e128", "t512-e512", "t128-e8", "t128-e128-r64", "t32-e8-dense", "t128-e64-top2",
    "t128-mixed", "t16384-e8", "t16384-e8-runs", "t16384-e8-dense", "t16384-e64-top2", "train-t16384-e8",
    "train-t16384-e8-dense", "train-t16384-e64-top2",
)  # fmt: skip


def case_of(bench: SimpleNamespace, name: str):
    return next(case for case in bench.cases.CASES if case.name == name)


def test_the_names_of_this_file_are_those_of_the_table(bench: SimpleNamespace) -> None:
    assert tuple(case.name for case in bench.cases.CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_case_runs_in_its_smoke_form(bench: SimpleNamespace, settings, name: str) -> None:
    case = case_of(bench, name)
    record = bench.measure.run_case(case.shrunk(), settings)
    assert record["status"] == "ok", record["reason"]
    assert record["missing"] == {}
    assert case.ratios.keys() <= record["graph_us"].keys()
    assert {"ours"} <= record["graph_us"].keys()
    assert case.training or {"null", "stream", "ours_plan", "loop"} <= record["graph_us"].keys()
    assert all(math.isfinite(time["median"]) for time in record["graph_us"].values())
    assert all(check["met"] is None for check in record["checks"])
    assert case.name in bench.ops.format_record({**record, "took_s": 0.0})
    json.dumps(record)


@pytest.mark.parametrize("name", ["t32-e32", "t32-e8-dense", "t128-e64-top2", "t128-mixed", "train-t16384-e8-dense"])
def test_a_case_runs_through_the_interpreted_kernels(bench: SimpleNamespace, settings, name: str) -> None:
    record = bench.measure.run_case(case_of(bench, name).shrunk(), replace(settings, backend="triton", quick=True))
    assert record["status"] == "ok", record["reason"]
    assert record["missing"] == {}


@pytest.mark.parametrize("name", ["t32-e32", "t32-e8-dense", "t128-e64-top2", "train-t16384-e8-dense"])
def test_a_perturbed_result_is_not_timed(
    bench: SimpleNamespace, settings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = bench.measure.ours
    for op in ("grouped_lora", "mixture_lora"):
        original = getattr(ours, op)

        def perturbed(x, *rest, original=original, **options):
            return original(1.001 * x, *rest, **options)

        monkeypatch.setattr(ours, op, perturbed)
    record = bench.measure.run_case(case_of(bench, name).shrunk(), settings)
    assert record["status"] == "red"
    assert "graph_us" not in record


def test_a_result_that_is_not_written_everywhere_is_red(bench: SimpleNamespace) -> None:
    operands = bench.operands.make_operands(case_of(bench, "t32-e8-dense").shrunk(), "cpu", torch.float32)
    wanted = bench.gate.expected(operands)
    with bench.gate.poisoned_memory():
        unwritten = torch.empty_like(operands.base_TD)
        unwritten[1:] = wanted[1:]
    with pytest.raises(bench.gate.RedGateError, match="nan of the norm"):
        bench.gate.require_close("ours", unwritten, wanted, 1e-3)
    assert torch.empty_like(wanted[:0]).isnan().sum() == 0


def test_a_wrong_baseline_has_no_time(bench: SimpleNamespace, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(bench.baselines.BASELINES[0], make=lambda operands: lambda: operands.base_TD.add_(1.0))
    monkeypatch.setattr(bench.baselines, "BASELINES", (wrong,))
    record = bench.measure.run_case(case_of(bench, "t32-e32").shrunk(), settings)
    assert record["status"] == "ok"
    assert "stacked" not in record["graph_us"]
    assert "RedGateError" in record["missing"]["stacked"]


def test_copies_pass_twice_the_cache_and_share_no_memory(bench: SimpleNamespace) -> None:
    first = bench.operands.make_operands(case_of(bench, "t128-e64-top2").shrunk(), "cpu", torch.float32)
    copies = bench.operands.cold_copies(first, 10 * first.bytes_read)
    assert sum(one.bytes_read for one in copies) > 20 * first.bytes_read
    places = {
        tensor.data_ptr()
        for one in copies
        for tensor in (one.x_TD, one.base_TD, one.gates, one.indices_TK, one.stack.a_RD, one.stack.index.starts_E)
    }
    assert len(places) == 6 * len(copies)
    torch.testing.assert_close(copies[-1].stack.a_RD, first.stack.a_RD)
    assert len(bench.operands.cold_copies(first, 1)) == 2


def test_bytes_count_only_adapters_that_occur(bench: SimpleNamespace) -> None:
    case = replace(case_of(bench, "t32-e32"), tokens=3, ranks=(2, 4, 8, 16), width=8)
    operands = bench.operands.make_operands(case, "cpu", torch.float32)
    rows = sum(case.ranks[adapter] for adapter in operands.ids_T.tolist())
    assert operands.bytes_read == 4 * (2 * rows * 8 + 2 * 3 * 8) + 8 * 3
    assert operands.bytes_written == 4 * 3 * 8


def test_the_stream_yardstick_writes_the_result_s_bytes_and_reads_the_rest(bench: SimpleNamespace) -> None:
    for call in bench.yardsticks.stream_calls(4 * 1500, 4 * 600, 2, "cpu", (512, 2)):
        words = call.__defaults__[0]
        before = words.clone()
        call()
        assert ((words - before) == (torch.arange(len(words)) < 600)).all()


def test_padded_operands_give_the_same_result(bench: SimpleNamespace) -> None:
    operands = bench.operands.make_operands(case_of(bench, "t128-mixed").shrunk(), "cpu", torch.float32)
    padded = bench.operands.padded(operands)
    assert set(padded.stack.ranks) == {max(operands.stack.ranks)}
    torch.testing.assert_close(bench.gate.expected(padded), bench.gate.expected(operands))


def test_the_command_writes_rows_and_knows_its_cases(bench: SimpleNamespace, tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--smoke", "--backend", BACKEND, "--case", "t1", "--out", str(out), "--commit", "abc"]
    assert bench.ops.main(arguments) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["case"] == "t1"
    assert row["environment"]["commit"] == "abc"
    assert row["smoke"] is True
    assert bench.ops.main(["--case", "nothing"]) == 2
    assert "unknown cases ['nothing']" in capsys.readouterr().err
