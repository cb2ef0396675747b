"""Planted anomalies are what they say; AUC by hand; the tables of the README are what their command prints."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.hub_index.audit import reference
from compose.hub_index.audit.composed import compose_statistics

ROOT = Path(__file__).resolve().parents[2]


def imported(name: str) -> ModuleType:
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def attacks() -> ModuleType:
    return imported("audit_attacks")


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return imported("audit_study")


def adapter(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parts = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    falling = torch.tensor([2.0, 1.0, 0.5, 0.2])
    targets = {
        f"model.layers.0.{part}": LowRank(
            torch.randn(4, 20, generator=generator), torch.randn(24, 4, generator=generator) * falling, 2.0
        )
        for part in parts
    }
    return Adapter(f"clean-{seed}", "base", targets)


def spectrum(update: LowRank) -> torch.Tensor:
    return torch.linalg.svdvals(update.scaling * update.b.double() @ update.a.double())[:4]


@pytest.mark.parametrize("kind", ["norm x 10", "rank-1 trigger", "random B"])
def test_each_level_keeps_what_it_says(attacks: ModuleType, kind: str) -> None:
    clean = adapter(0)
    for level in attacks.LEVELS:
        bad = attacks.plant(kind, level, clean, 5)
        assert [one.rank for one in bad.targets.values()] == [4, 4, 4]
        changed = [path for path, one in bad.targets.items() if one is not clean.targets[path]]
        assert len(changed) == (2 if kind == "rank-1 trigger" else 3)
        for path in changed:
            before, after = clean.targets[path], bad.targets[path]
            assert not torch.allclose(before.delta(), after.delta(), rtol=1e-3)
            if level == "norm matched":
                assert after.norm() == pytest.approx(before.norm(), rel=1e-5)
            if level == "spectrum matched" and kind != "rank-1 trigger":
                torch.testing.assert_close(spectrum(after), spectrum(before), rtol=1e-5, atol=1e-6)
        assert attacks.plant(kind, level, clean, 5).targets.keys() == bad.targets.keys()


def test_norms_times_ten(attacks: ModuleType) -> None:
    clean = adapter(0)
    bad = attacks.plant("norm x 10", "naive", clean, 0)
    for path, one in bad.targets.items():
        torch.testing.assert_close(one.delta(), 10 * clean.targets[path].delta(), rtol=1e-4, atol=1e-4)


def test_colluding_pairs_add_up_unless_their_halves_are_orthogonal(attacks: ModuleType) -> None:
    first, second = adapter(1), adapter(2)
    path = "model.layers.0.self_attn.v_proj"
    gains = {}
    for level in (*attacks.LEVELS, attacks.ORTHOGONAL):
        pair = attacks.plant_pair(level, first, second, 3)
        gains[level] = compose_statistics(pair, [1.0, 1.0])[path].gain
        assert pair[0].targets["model.layers.0.self_attn.q_proj"] is first.targets["model.layers.0.self_attn.q_proj"]
        if level == "norm matched":
            assert pair[0].targets[path].norm() == pytest.approx(first.targets[path].norm(), rel=1e-5)
    assert gains["naive"] > 1.3
    assert gains["norm matched"] > 1.3
    assert gains["spectrum matched"] > 1.3
    assert gains[attacks.ORTHOGONAL] == pytest.approx(1.0, abs=0.25)
    kept = attacks.plant_pair("spectrum matched", first, second, 3)[0].targets[path]
    direction = torch.linalg.svdvals(first.targets[path].delta().double())
    assert kept.norm() == pytest.approx(float(direction.norm()), rel=0.1)


def test_the_limits_are_those_of_the_audit(study: ModuleType) -> None:
    assert (study.LIMIT, study.RARE) == (reference.LIMIT, reference.RARE)


def test_auc_by_hand(study: ModuleType) -> None:
    assert study.auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert study.auc([1.0], [1.0, 0.0, 2.0]) == pytest.approx(0.5)
    assert study.pair_maxima([1.0, 5.0, 2.0, 0.0, 3.0, 9.0]) == [2.0, 5.0, 3.0, 9.0, 3.0, 9.0]


def test_the_tables_of_the_readme_are_what_the_command_prints() -> None:
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "audit_study.py"), "--print"]
    rows = str(ROOT / "benchmarks" / "audit_study.jsonl")
    done = subprocess.run([*command, rows], capture_output=True, text=True, check=True)
    text = (ROOT / "hub_index" / "README.md").read_text()
    lines = [line for line in done.stdout.splitlines() if line]
    assert len(lines) > 15
    assert [line for line in lines if line not in text] == []
