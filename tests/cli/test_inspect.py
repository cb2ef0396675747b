"""``compose inspect`` on a good adapter, broken ones and banks. (The module is ``inspect_``.)"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from compose.adapter import Adapter, LowRank
from compose.cli.adapter_facts import delta_norm
from compose.cli.main import build_app
from compose.formats.peft import read_adapter, write_adapter


def inspect(*arguments: object):
    return CliRunner().invoke(build_app(), ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def bank(workspace, tmp_path: Path) -> Path:
    """A copy of the bank that a test may damage."""
    return Path(shutil.copytree(workspace.bank, tmp_path / "bank"))


def test_an_adapter_is_described_from_its_header(workspace) -> None:
    result = inspect(workspace.bank / "beta")
    assert result.exit_code == 0, result.stderr
    for word in ("beta", "peft", "tiny-base", "4 modules, rank 4", "float32", "model.layers.*.self_attn.q_proj"):
        assert word in result.stdout
    assert "sha256" not in result.stdout
    assert "norm" not in result.stdout.split("target (")[0]


def test_json_holds_every_target(workspace) -> None:
    facts = json.loads(inspect(workspace.bank / "beta", "--json").stdout)
    assert facts["kind"] == "adapter"
    assert len(facts["targets"]) == facts["targets_count"] == 4
    target = facts["targets"]["model.layers.1.self_attn.v_proj"]
    assert (target["rank"], target["in_features"], target["out_features"], target["scaling"]) == (4, 16, 16, 0.5)
    assert (facts["parameters"], facts["problems"], facts["sha256"], facts["norm"]) == (512, [], None, None)


def test_norms_are_those_of_the_deltas(workspace) -> None:
    folder = workspace.bank / "alpha"
    facts = json.loads(inspect(folder, "--norms", "--json").stdout)
    adapter = read_adapter(folder)
    for path, update in adapter.targets.items():
        assert facts["targets"][path]["norm"] == pytest.approx(update.delta().norm().item(), rel=1e-5)
    assert facts["norm"] == pytest.approx(
        math.sqrt(sum(u.delta().norm().item() ** 2 for u in adapter.targets.values()))
    )
    assert facts["sha256"] == adapter.sha256


def test_hash_alone_reads_no_norms(workspace) -> None:
    facts = json.loads(inspect(workspace.bank / "alpha", "--hash", "--json").stdout)
    assert facts["sha256"] == read_adapter(workspace.bank / "alpha").sha256
    assert facts["norm"] is None


def test_a_broken_adapter_is_refused_with_a_reason(bank: Path) -> None:
    weights = bank / "beta" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    result = inspect(bank / "beta")
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert "beta" in result.stderr
    facts = json.loads(inspect(bank / "beta", "--json").stdout)
    assert len(facts["problems"]) == 1


def test_values_that_are_not_finite_are_a_problem(bank: Path) -> None:
    file = bank / "beta" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    result = inspect(bank / "beta", "--norms")
    assert result.exit_code == 2
    assert "finite" in result.stderr


def test_the_norm_of_a_huge_delta_is_not_a_number_instead_of_an_error() -> None:
    assert math.isnan(delta_norm(LowRank(torch.ones(1, 4), torch.tensor([[1.0], [math.nan]]), 1.0)))


def test_an_adapter_that_changes_nothing_is_noted(tmp_path: Path) -> None:
    zero = LowRank(torch.ones(1, 4), torch.zeros(2, 1), 1.0)
    write_adapter(Adapter("zero", "x", {"lin": zero}), tmp_path / "zero")
    result = inspect(tmp_path / "zero", "--norms")
    assert result.exit_code == 0
    assert "changes nothing" in result.stderr


def test_a_bank_lists_its_broken_adapters_and_stays_usable(bank: Path) -> None:
    (bank / "beta" / "adapter_config.json").write_text("{")
    result = inspect(bank)
    assert result.exit_code == 0, result.stderr
    assert "2 of 3 adapters usable" in result.stdout
    assert "Problems (1):" in result.stdout
    facts = json.loads(inspect(bank, "--json").stdout)
    assert (facts["kind"], facts["usable"], len(facts["adapters"])) == ("bank", 2, 3)
    assert list(facts["problems"]) == [str(bank / "beta")]


def test_adapters_that_do_not_fit_each_other_are_a_problem_of_the_bank(bank: Path) -> None:
    odd = {"model.layers.0.self_attn.q_proj": LowRank(torch.ones(2, 8), torch.ones(16, 2), 1.0)}
    write_adapter(Adapter("odd", "tiny-base", odd), bank / "odd")
    facts = json.loads(inspect(bank, "--json").stdout)
    assert facts["usable"] == 3
    assert "8 -> 16" in json.dumps(facts["problems"])


def test_a_bank_with_nothing_usable_exits_with_2(bank: Path) -> None:
    for folder in bank.iterdir():
        (folder / "adapter_config.json").write_text("[]")
    assert inspect(bank).exit_code == 2


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_a_folder_without_adapters_is_refused(tmp_path: Path, where: str) -> None:
    result = inspect(tmp_path / where)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert str(tmp_path) in result.stderr


def test_a_hostile_base_name_cannot_reach_the_terminal(bank: Path) -> None:
    config = bank / "beta" / "adapter_config.json"
    record = json.loads(config.read_text()) | {"base_model_name_or_path": "\x1b[2Jx[bold]y"}
    config.write_text(json.dumps(record))
    result = inspect(bank / "beta")
    assert "\x1b" not in result.stdout + result.stderr
    assert "[bold]y" in result.stdout + result.stderr
