"""routers/README.md: its tables are those of the registries, its examples run, its links lead somewhere."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from compose.errors import ComposeError
from compose.routers.losses.registry import LOSSES
from compose.routers.presets.registry import PRESETS
from compose.routers.spec import MixtureSpec
from compose.routers.steps import GATES, NORMALISATIONS, SELECTORS
from compose.routers.tables import SECTIONS, filled, main

FOLDER = Path(__file__).resolve().parents[2] / "routers"
README = (FOLDER / "README.md").read_text()
ROWS = {line.split("|")[1].strip(): line for line in README.splitlines() if line.startswith("| `")}


def test_the_tables_are_what_their_command_makes() -> None:
    assert filled(README) == README, "run: python -m compose.routers.tables --write routers/README.md"


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_in_the_table_with_its_paper_and_summary(name) -> None:
    entry, row = PRESETS[name], ROWS[f"`{name}`"]
    assert entry.paper in row
    assert entry.summary.replace("|", "\\|") in row
    listed = next((line for line in README.splitlines() if line.startswith(f"- `{name}`: ")), "")
    assert [each for each in (*entry.spec.departures, entry.limits) if each not in listed] == []


@pytest.mark.parametrize("registry", [GATES, NORMALISATIONS, SELECTORS, LOSSES], ids=lambda each: each.kind)
def test_every_component_is_in_a_table(registry) -> None:
    assert [name for name in registry if f"`{name}`" not in ROWS] == []


def test_every_file_is_named() -> None:
    assert [path.name for path in FOLDER.glob("*.py") if f"`{path.name}`" not in ROWS] == []
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    assert [name for name in folders if f"`{name}/`" not in README] == []


def test_every_field_of_a_mixture_is_explained() -> None:
    page = README[README.index("## The design") : README.index("## Presets")]
    assert [each.name for each in fields(MixtureSpec) if f"`{each.name}`" not in page and each.name != "preset"] == []


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(links) >= 4
    assert [link for link in links if link not in anchors and not (FOLDER / link).exists()] == []


def test_a_document_with_other_places_is_refused() -> None:
    with pytest.raises(ComposeError, match="needed are"):
        filled(README.replace("<!-- begin: files -->\n", ""))
    with pytest.raises(ComposeError, match="has no line '<!-- end: files -->'"):
        filled(README.replace("<!-- end: files -->\n", ""))


def test_the_command_prints_every_table_and_writes_a_document(tmp_path, capsys) -> None:
    main([])
    printed = capsys.readouterr().out
    assert [name for name in SECTIONS if f"## {name}\n" not in printed] == []
    copy = tmp_path / "README.md"
    copy.write_text(README.replace("| `xlora` |", "| `of old` |"))
    main(["--write", str(copy)])
    assert copy.read_text() == filled(README)
    with pytest.raises(ComposeError, match="usage"):
        main(["--other"])


@pytest.mark.slow
def test_the_examples_run(tmp_path, warm_python) -> None:
    """One after the other, as a reader would; only the numbers of steps are smaller."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    assert [len(block.splitlines()) for block in blocks if len(block.splitlines()) > 12] == []
    rows = [{"task": task, "prompt": f"{task}: a b {n}", "response": f"{n} b a"} for task in "xy" for n in range(9)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "\n".join(blocks).replace("300", "2")
    done = warm_python.run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "mixture").iterdir()} >= {"mixture.json", "experts.safetensors"}
    assert (tmp_path / "both" / "adapter_config.json").is_file()
    assert not list((tmp_path / "run").rglob("model.safetensors"))
