"""Every benchmark case runs in its quick form, and its gate goes red when our output is perturbed."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compose.engine.layers import ComposedLinear
from compose.hub_index import search
from compose.kernels.grouped_lora import cpu as grouped_cpu
from compose.kernels.mixture_lora import cpu as mixture_cpu
from compose.merging.deltas import Deltas, Factors
from compose.retriever.vectors import numpy_

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = sorted(path.stem for path in (BENCHMARKS / "cases").glob("[a-z]*.py"))

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data"),
]


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of ``benchmarks/``, importable while these tests run."""
    pytest.importorskip("peft")
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        registry = importlib.import_module("registry")
        run = importlib.import_module("run")
        yield SimpleNamespace(registry=registry, run=run, cases=registry.load_cases(), timing=sys.modules["timing"])
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            found = getattr(sys.modules[name], "__file__", None)
            if found and BENCHMARKS in Path(found).parents:
                del sys.modules[name]


@pytest.fixture(scope="module")
def quick(bench: SimpleNamespace):
    return bench.registry.Settings(quick=True)


@pytest.fixture(scope="module")
def quick_records(bench: SimpleNamespace, quick):
    """Return what a case records in its quick form, which runs once: ``quick_records("merging")``."""
    return cache(lambda name: bench.run.run_case(bench.cases[name], quick))


def test_every_file_of_the_folder_registers_cases(bench: SimpleNamespace) -> None:
    files = {case.points.__module__.removeprefix("cases.") for case in bench.cases.values()}
    assert sorted(files) == NAMES
    assert all(case.description and case.baseline and case.targets for case in bench.cases.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_case_runs_in_its_quick_form(quick_records, name: str) -> None:
    records = quick_records(name)
    assert records
    assert [record.get("reason") for record in records if record["status"] != "ok"] == []
    for record in records:
        assert record["checks"]
        assert all(math.isfinite(check["value"]) for check in record["checks"])
    json.dumps(records)


@pytest.mark.parametrize("name", NAMES)
def test_a_perturbed_output_turns_the_gate_red(
    bench: SimpleNamespace, quick, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, combine = ComposedLinear.forward, Deltas.combine

    def perturbed(self: ComposedLinear, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) * 1.1

    def perturbed_merge(self: Deltas, coefficients: torch.Tensor) -> Factors:
        return combine(self, 1.1 * coefficients)

    def perturbed_kernel(*operands: object, **options: object) -> torch.Tensor:
        return grouped_forward(*operands, **options) * 1.1

    def perturbed_ranking(*operands: object) -> search.Ranked:
        return search.Ranked(*(part[1:] for part in first(*operands)))

    def perturbed_neighbours(*operands: object) -> tuple[object, object]:
        rows, scores = exact(*operands)
        return (rows + 1) % 100, scores

    grouped_forward, first, exact = grouped_cpu.forward, search.first, numpy_.exact
    points = bench.cases[name].points(quick)
    point = next(points)
    point.gate()
    monkeypatch.setattr(grouped_cpu, "forward", perturbed_kernel)
    monkeypatch.setattr(ComposedLinear, "forward", perturbed)
    monkeypatch.setattr(Deltas, "combine", perturbed_merge)
    monkeypatch.setattr(search, "first", perturbed_ranking)
    monkeypatch.setattr(numpy_, "exact", perturbed_neighbours)
    record = bench.run.run_point(point)
    assert record["status"] == "failed"
    assert record["reason"].startswith("gate is red")
    assert "ours" not in record


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["merging", "merging_llama8b"])
def test_every_method_s_gate_sees_its_result(
    bench: SimpleNamespace, quick, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtype of the reference, and on large shapes in the dtype that is measured too."""
    from compose.engine import merge

    merge_target = merge._merge_target

    def perturbed(target: str, method: object, deltas: Deltas, *rest: object):
        whole = merge_target(target, method, deltas, *rest)
        factor = 1.1 if deltas.dtype == dtype else 1.0
        return whole._replace(delta=SimpleNamespace(dense=lambda: whole.delta.dense() * factor))

    monkeypatch.setattr(merge, "_merge_target", perturbed)
    monkeypatch.setattr(merge.MergedTarget, "on_cpu", lambda self: self)
    points = [point for point in bench.cases[name].points(quick) if "memory" not in point.label]
    if name == "merging":
        points = [point for point in points if ("one target" in point.label) == (dtype == torch.float32)]
    assert points
    for point in points:
        with pytest.raises(AssertionError):
            point.gate()


def test_a_case_without_its_baseline_is_skipped_with_the_reason(bench: SimpleNamespace, quick) -> None:
    case = bench.registry.Case("x", "d", "b", "t", lambda settings: [], requires=("no_such_package",))
    (record,) = bench.run.run_case(case, quick)
    assert record["status"] == "skipped"
    assert "no_such_package" in record["reason"]


def test_a_case_for_a_gpu_is_skipped_on_the_cpu(bench: SimpleNamespace, quick) -> None:
    assert "cuda" in bench.cases["search_generation_gpu"].reason_to_skip(quick)


def test_a_failure_is_recorded_and_gives_exit_code_1(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def red() -> None:
        raise AssertionError("they differ")

    def points(settings: object) -> Iterator[object]:
        yield bench.registry.Point("only", red, lambda: pytest.fail("timed on a red gate"))

    case = bench.registry.Case("broken", "d", "b", "t", points)
    monkeypatch.setitem(bench.registry.CASES, "broken", case)
    assert bench.run.main(["--case", "broken", "--quick", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert record["status"] == "failed"
    assert record["reason"] == "gate is red: they differ"
    assert {"torch", "device", "threads", "commit"} <= record["environment"].keys()


def test_two_cases_of_one_name_are_refused(bench: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="two benchmark cases are named 'mixed_batch'"):
        bench.registry.case("mixed_batch", description="d", baseline="b", targets="t")(lambda settings: [])


def test_interleaved_timing_calls_both_in_turn(bench: SimpleNamespace) -> None:
    calls: list[str] = []
    ours, baseline = bench.timing.interleaved(
        lambda: calls.append("ours"), lambda: calls.append("baseline"), rounds=3, at_least=0.0
    )
    assert calls[4:] == ["ours", "baseline", "baseline", "ours", "ours", "baseline"]
    assert len(ours.samples) == len(baseline.samples) == 3


def test_a_check_knows_whether_its_target_is_met(bench: SimpleNamespace) -> None:
    check = bench.registry.Check
    assert check("speed-up", 2.0, ">=", 1.5).met is True
    assert check("overhead", 2.0, "<=", 1.5).met is False
    assert check("seconds", 2.0).met is None


def test_every_gate_of_the_kernels_sees_its_result(
    bench: SimpleNamespace, quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (grouped_cpu, mixture_cpu):
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, forward=forward, **k: forward(*a, **k) * 1.1)
    for point in bench.cases["kernels_cpu"].points(quick):
        with pytest.raises(AssertionError, match="relative errors"):
            point.gate()


def test_a_mean_over_shapes_stores_every_shape_with_the_loop_and_the_bound(quick_records) -> None:
    for record in quick_records("kernels_cpu"):
        assert len(record["cells"]) == 2
        for cell in record["cells"]:
            assert min(cell["ours_us"], cell["loop_us"]) > 0
            assert ("bare_us" in cell) == ("backward" not in record["point"])
        ratios = [cell["loop_us"] / cell["ours_us"] for cell in record["cells"]]
        assert record["checks"][0]["value"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
