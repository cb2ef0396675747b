"""``compose index`` as people and programs use it: what it prints, its exit codes, and what it does not import."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from compose.cli.main import build_app
from compose.hub_index import Index
from tests.hub_index.folders import CARD, make


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    return build_app()


@pytest.fixture
def run(app, tmp_path: Path):
    """Call ``compose index ...`` here; ``--json`` output is parsed."""

    def call(*words: str, code: int = 0):
        result = CliRunner().invoke(app, ["index", *words], env={"COMPOSE_INDEX": str(tmp_path / "adapters.db")})
        assert result.exit_code == code, result.output
        return json.loads(result.stdout) if "--json" in words else result.stdout

    return call


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Two sound adapters, one in quarantine, one that is refused."""
    tree = tmp_path / "bank"
    make(tree / "sums")
    make(tree / "sorts", 1, card=CARD.replace("Adds numbers.", "Sorts words.").replace("# Sums", "# Sorts"))
    make(tree / "odd", 2, auto_mapping={"parent_library": "os"}, card=None)
    make(tree / "torn", 3, r=9)
    return tree


def test_adding_lists_every_adapter_and_a_refusal_is_exit_code_3(run, bank: Path) -> None:
    found = run("add", str(bank), "--json", code=3)
    states = {one["name"]: (one["state"], one["code"]) for one in found["adapters"]}
    assert states == {
        "sums": ("active", ""), "sorts": ("active", ""), "odd": ("quarantined", ""), "torn": ("refused", "format"),
    }  # fmt: skip
    shutil.rmtree(bank / "torn")
    text = run("add", str(bank))
    assert "3 present" in text
    assert run("--json")["statuses"] == {"active": 2, "quarantined": 1, "removed": 0}


def test_reasons_are_shown_to_people(run, bank: Path) -> None:
    text = run("add", str(bank), code=3)
    assert "odd: quarantined: config.import: auto_mapping.parent_library 'os'" in text
    assert "torn: refused: " in text
    assert "2 active, 1 quarantined, 1 refused" in text or "1 quarantined" in text


def test_listing_showing_and_asking(run, bank: Path) -> None:
    run("add", str(bank), code=3)
    assert [one["name"] for one in run("ls", "--json")["adapters"]] == ["sorts", "sums"]
    assert [one["name"] for one in run("ls", "--status", "quarantined", "--json")["adapters"]] == ["odd"]
    assert "sums" in run("ls", "--rank", "1-4", "--license", "MIT", "--task", "sums", "--base", "org/toy")
    assert run("ls", "--rank", "3-4", "--json")["adapters"] == []
    (hit,) = run("query", "numbers", "--json")["adapters"]
    assert (hit["name"], hit["cosine"], hit["bm25"] < 0) == ("sums", None, True)
    assert "nothing found" in run("query", "astronomy")
    shown = run("show", "sums", "--json")["adapter"]
    assert (shown["title"], shown["license"], len(shown["modules"])) == ("Sums", "mit", 4)
    assert "and 2 more" not in run("show", "sums")
    assert "sha256" in run("show", "odd")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ls", "--rank", "x"), "--rank must be a number"),
        (("ls", "--score", "gsm8k>0.4"), "--score must be TASK:METRIC>=VALUE"),
        (("ls", "--status", "odd"), "status must be one of"),
        (("show", "nobody"), "unknown adapter 'nobody'"),
        (("add", "neither/a/path"), "neither a folder, nor a file, nor a Hugging Face id"),
        (("add", "x", "--quarantine-at", "bad"), "--quarantine-at must be"),
    ],
)
def test_what_cannot_be_is_exit_code_2(words, message: str, app, bank: Path, tmp_path: Path) -> None:
    environment = {"COMPOSE_INDEX": str(tmp_path / "adapters.db")}
    CliRunner().invoke(app, ["index", "add", str(bank)], env=environment)
    result = CliRunner().invoke(app, ["index", *words], env=environment)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_without_an_index_the_next_step_is_told(app, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["index", "ls", "--index", str(tmp_path / "none.db")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "compose index add PATH" in " ".join(result.stderr.split())
    assert not (tmp_path / "none.db").exists()


def test_files_are_refused_by_what_they_are(run, bank: Path) -> None:
    (one,) = run("add", str(bank / "sums" / "adapter_model.safetensors"), "--json", code=3)["adapters"]
    assert (one["state"], one["code"]) == ("refused", "file")


def test_verify_exits_with_1_when_a_file_changed(run, bank: Path) -> None:
    run("add", str(bank), code=3)
    assert "3 ok" in run("verify")
    weights = bank / "sums" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found = run("verify", "--json", code=1)
    assert [one["name"] for one in found["adapters"] if one["state"] == "changed"] == ["sums"]
    assert found["damage"] == []
    assert "1 ok" in run("verify", "sorts")


def test_an_audit_is_stored_and_exits_with_4_on_demand(run, bank: Path, tmp_path: Path) -> None:
    run("add", str(bank), code=3)
    assert run("audit", "sums", "--fail-on", "medium", "--dry-run", "--json")["refused"] is False
    with Index.open(tmp_path / "adapters.db", readonly=True) as index:
        assert index.get("sums").stats == ()
    run("audit", "--fail-on", "high", code=4)  # auto_mapping of "odd"
    with Index.open(tmp_path / "adapters.db", readonly=True) as index:
        assert len(index.get("sums").stats) == 4
    make(tmp_path / "other", 9, r=5)
    weights = bank / "sums" / "adapter_model.safetensors"
    shutil.copy(tmp_path / "other" / "adapter_config.json", bank / "sums" / "adapter_config.json")
    assert weights.exists()
    assert "quarantined" in run("audit", "sums")
    assert [one["name"] for one in run("ls", "--json")["adapters"]] == ["sorts"]


def test_an_index_is_given_away_as_jsonl(run, app, bank: Path, tmp_path: Path) -> None:
    run("add", str(bank), code=3)
    assert run("export", str(tmp_path / "all.jsonl"), "--json")["adapters"] == 3
    run("export", str(tmp_path / "all.jsonl"), code=2)
    other = {"COMPOSE_INDEX": str(tmp_path / "other.db")}
    result = CliRunner().invoke(app, ["index", "import", str(tmp_path / "all.jsonl")], env=other)
    assert "3 added" in result.stdout
    with Index.open(tmp_path / "adapters.db") as one, Index.open(tmp_path / "other.db") as two:
        assert one.get("sums").modules == two.get("sums").modules


def test_removed_adapters_are_swept(run, bank: Path) -> None:
    run("add", str(bank), code=3)
    run("remove", "sums", "odd")
    assert run("gc", "--dry-run", "--json")["adapters"] == ["odd", "sums"]
    assert run("gc", "--json")["adapters"] == ["odd", "sums"]
    assert run("gc", "--json")["adapters"] == []


def test_descriptions_are_a_source(run, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"name": "told", "summary": "Translates."}\n')
    assert run("add", str(tmp_path / "d.jsonl"), "--json")["adapters"][0]["state"] == "active"
    assert "told" in run("query", "translates")


def test_asking_imports_no_torch_and_no_numpy(run, bank: Path, tmp_path: Path) -> None:
    run("add", str(bank), code=3)
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from compose.cli.main import build_app\n"
        "app = build_app()\n"
        "for words in (['ls'], ['query', 'numbers'], ['show', 'sums'], ['verify'], ['--json']):\n"
        "    result = CliRunner().invoke(app, ['index', *words])\n"
        "    heavy = [one for one in ('torch', 'transformers', 'numpy', 'huggingface_hub') if one in sys.modules]\n"
        "    print(words[0], result.exit_code, heavy)\n"
    )
    environment = {**os.environ, "COMPOSE_INDEX": str(tmp_path / "adapters.db")}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    words = ("ls", "query", "show", "verify", "--json")
    assert done.stdout.splitlines() == [f"{word} 0 []" for word in words]


def test_vectors_are_made_and_asked(run, bank: Path) -> None:
    pytest.importorskip("sentence_transformers")
    run("add", str(bank), code=3)
    done = run("embed", "--encoder", "minilm", "--json")
    assert done["written"] == ["odd", "sorts", "sums"]
    best = run("query", "arithmetic with figures", "--encoder", "minilm", "--json")["adapters"][0]
    assert (best["name"], best["bm25"]) == ("sums", None)
    assert best["cosine"] > 0.2
