"""``compose audit``: tables, JSON, exit codes, compositions."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compose.cli.main import build_app


def audit(*arguments: object):
    return CliRunner().invoke(build_app(), ["audit", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def hostile(workspace, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(workspace.bank / "alpha", tmp_path / "alpha"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e30, "revision": "\x1b[31mmain"}))
    return folder


def test_one_adapter_as_a_table(workspace) -> None:
    result = audit(workspace.bank / "beta", "--base", workspace.base)
    assert result.exit_code == 0, result.stderr
    for text in ("beta", "tiny-base", "0, no reference", "no hard finding", "card.licence", "stats.no-reference"):
        assert text in result.stdout
    assert "clean" not in result.stdout


def test_a_folder_of_adapters_as_json(workspace) -> None:
    result = audit(workspace.bank, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["schema_version"], found["refused"], found["composition"]) == (1, False, None)
    assert [one["name"] for one in found["adapters"]] == ["alpha", "beta", "gamma"]
    first = found["adapters"][0]
    assert first["state"] == "no reference"
    assert len(first["sha256"]) == 64
    assert first["statistics"]["model.layers.0.self_attn.q_proj"]["rank"] == 2


@pytest.mark.parametrize(
    ("severity", "code"), [("low", 4), ("medium", 4), ("high", 4), ("critical", 4)], ids=lambda value: str(value)
)
def test_a_hostile_adapter_fails_from_any_severity(hostile: Path, severity: str, code: int) -> None:
    result = audit(hostile, "--fail-on", severity)
    assert result.exit_code == code
    assert "refused" in result.stdout
    assert "critical !" in result.stdout
    assert "\x1b[31m" not in result.stdout


def test_findings_below_the_severity_do_not_fail(workspace) -> None:
    assert audit(workspace.bank / "beta", "--fail-on", "low").exit_code == 4  # no licence
    assert audit(workspace.bank / "beta", "--fail-on", "medium").exit_code == 0


def test_findings_alone_are_no_failure(hostile: Path) -> None:
    result = audit(hostile)
    assert result.exit_code == 0
    assert "config.scaling" in result.stdout


def test_a_composed_delta(workspace) -> None:
    result = audit(workspace.bank, "--compose", "0.6*alpha - 0.4*beta", "--base", workspace.base)
    assert result.exit_code == 0, result.stderr
    for text in ("Composed delta: 0.6*alpha + -0.4*beta", "largest member", "composed.no-reference"):
        assert text in result.stdout
    found = json.loads(audit(workspace.bank, "--compose", "0.6*alpha - 0.4*beta", "--json").stdout)
    assert found["composition"]["coefficients"] == {"alpha": 0.6, "beta": -0.4}
    assert [one["layer"] for one in found["composition"]["layers"]] == ["0", "1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compose", "0.6*alpha - 0.4*nobody"], "nobody"),
        (["--compose", "0.6*"], "expression"),
        (["--base", "nobody/no-such-model"], "neither a folder nor in the cache"),
        (["--index", "/nonexistent/adapters.db"], "no such index"),
    ],
)
def test_wrong_use_is_told_and_exits_with_two(workspace, arguments: list[str], words: str) -> None:
    result = audit(workspace.bank, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_name_that_is_neither_folder_nor_in_an_index(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    result = audit("no-such-adapter")
    assert result.exit_code == 2
    assert "--index" in result.stderr


def test_a_name_of_an_index(workspace, tmp_path: Path, monkeypatch) -> None:
    from compose.formats.peft import read_adapter
    from compose.hub_index.records import AdapterRecord
    from compose.hub_index.store import Index

    folder = workspace.bank / "gamma"
    sha256 = read_adapter(folder).sha256
    with Index.open(tmp_path / "adapters.db", create=True) as index:
        index.add(AdapterRecord(name="mine", sha256_weights=sha256, path=str(folder), license="mit"))
        index.add(AdapterRecord(name="moved", sha256_weights="0" * 64, path=str(folder), license="mit"))
    result = audit("mine", "--index", tmp_path / "adapters.db", "--fail-on", "medium")
    assert result.exit_code == 0, result.stderr
    assert "mine" in result.stdout
    assert "card.licence" not in result.stdout
    monkeypatch.setenv("COMPOSE_INDEX", str(tmp_path / "adapters.db"))
    assert audit("mine").stdout == result.stdout
    result = audit("moved", "--index", tmp_path / "adapters.db", "--fail-on", "critical")
    assert result.exit_code == 4
    assert "values.changed" in result.stdout
