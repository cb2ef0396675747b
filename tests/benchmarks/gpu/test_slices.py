"""The benchmark of slices in its smoke form: everything but the clock, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu" / "slices.py"


def test_every_case_passes_its_gate_and_is_recorded(tmp_path, warm_python):
    out = tmp_path / "slices.jsonl"
    done = warm_python.run(SCRIPT, "--smoke", "--commit", "test", "--out", out)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["status"] for record in records] == ["ok"] * 12
    assert {record["case"].rsplit("-", 2)[0] for record in records if record["case"].endswith("e8")} == {
        "qkv",
        "gate-up",
    }
    assert all(record["error"] <= 1e-6 and record["fused_us"] > 0 < record["separate_us"] for record in records)
    assert records[0]["environment"]["commit"] == "test"
    assert "qkv-t1" in done.stdout
