"""The end-to-end GPU benchmark in its smoke form: a tiny model on a CPU, everything but the clock."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compose.engine.layers import ComposedLinear

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
BACKEND = "cpu"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke form interprets kernels on the CPU"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of ``benchmarks/gpu``, importable while these tests run."""
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("llama", "llama_measure", "llama_model")
        yield SimpleNamespace(**{name: importlib.import_module(f"gpu.{name}") for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            found = getattr(sys.modules[name], "__file__", None)
            if found and BENCHMARKS in Path(found).parents:
                del sys.modules[name]


@pytest.fixture
def setting(bench: SimpleNamespace):
    size = bench.llama_model.TINY
    with torch.no_grad():
        model = bench.llama_model.build_model(size, "cpu")
        yield bench.llama_measure.Setting(model, size, "cpu", BACKEND, True, 0.0)


def base_times(bench: SimpleNamespace, setting) -> dict:
    steps = bench.llama_measure.STEPS.items()
    return {
        step: bench.llama_measure.time_step(make(setting.model, setting.size, "cpu"), "cpu") for step, make in steps
    }


@pytest.mark.parametrize("targets", ["QV", "ALL_LINEAR"])
def test_both_steps_give_a_record_with_ratios_and_floors(bench: SimpleNamespace, setting, targets: str) -> None:
    setting = replace(setting, bandwidth=1e12)
    wanted = getattr(bench.llama_model, targets)
    records = bench.llama_measure.run_targets(targets, wanted, setting, base_times(bench, setting))
    assert [record["step"] for record in records] == ["decode", "prompt"]
    assert [record.get("reason") for record in records] == [None, None]
    for record in records:
        names = [check["name"] for check in record["checks"]]
        assert {"ours / base, graph", "PEFT eager / ours eager"} <= set(names)
        assert sum(name.startswith("floor") for name in names) == (2 if record["step"] == "decode" else 1)
        assert all(check["met"] is None for check in record["checks"])
        assert record["eager_ms"].keys() == {"base", "ours", "peft"}
        assert record["error"] < 1e-4
        json.dumps(bench.llama.format_record(record))
    assert not any(isinstance(module, ComposedLinear) for module in setting.model.modules())


def test_other_logits_than_peft_s_are_not_timed(
    bench: SimpleNamespace, setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ComposedLinear.forward
    monkeypatch.setattr(ComposedLinear, "forward", lambda self, x: forward(self, x) * 1.01)
    base = base_times(bench, setting)
    records = bench.llama_measure.run_targets("qv", bench.llama_model.QV, setting, base)
    assert [record["status"] for record in records] == ["red", "red"]
    assert "away from PEFT" in records[0]["reason"]
    assert all("graph_ms" not in record for record in records)


def test_a_decode_step_repeats_itself_and_sees_the_whole_cache(bench: SimpleNamespace, setting) -> None:
    step = bench.llama_model.decode_step(setting.model, setting.size, "cpu")
    first, second = step(), step()
    assert torch.equal(first, second)
    longer = replace(setting.size, context=setting.size.context + 1)
    assert not torch.allclose(first, bench.llama_model.decode_step(setting.model, longer, "cpu")())


def test_the_prompt_pass_is_causal_without_a_mask(bench: SimpleNamespace, setting) -> None:
    unmasked = bench.llama_model.prompt_pass(setting.model, setting.size, "cpu")()
    setting.model.set_attn_implementation("eager")
    torch.testing.assert_close(unmasked, bench.llama_model.prompt_pass(setting.model, setting.size, "cpu")())


def test_update_bytes_count_factors_once_and_rows_per_token(bench: SimpleNamespace, setting) -> None:
    adapters = bench.llama_model.make_adapters(setting.model, setting.size, ("k_proj",), "cpu")
    rank, layers = setting.size.rank, 2
    factors, rows = bench.llama_model.update_bytes(adapters[:2], 5)
    assert factors == 2 * layers * rank * (64 + 32) * 4
    assert rows == 5 * layers * (64 + 2 * 32) * 4


def test_the_command_runs_without_peft_and_writes_rows(bench: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--smoke", "--backend", BACKEND, "--no-peft", "--targets", "qv", "--out", str(out), "--commit", "abc"]
    assert bench.llama.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows] == ["decode", "prompt"]
    assert rows[0]["error"] is None
    assert rows[0]["environment"]["commit"] == "abc"
