"""Imports point one way (DESIGN: errors <- registry, adapter, kernels <- ... <- cli)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"errors"},
    {"registry", "adapter", "files", "kernels"},
    {"text"},
    {"merging", "routers", "search", "retriever", "formats"},
    {"hub_index"},
    {"bank"},
    {"engine"},
    {"fewshot"},
    {"evaluation"},
    {"report", "demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OUTSIDE = ("routers", "retriever", "kernels", "hub_index")


def source_files() -> list[Path]:
    return sorted(path for folder in ("compose", *OUTSIDE) for path in (ROOT / folder).rglob("*.py"))


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "compose" else parts[0]


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("compose.")}
    return found & LEVEL.keys()


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_lower_layers(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LEVEL, f"{part} has no place in the layers; add it to LAYERS and to DESIGN"
    above = {other for other in imported_parts(path) if other != part and LEVEL[other] >= LEVEL[part]}
    assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)} from its own or a higher layer"


def test_the_check_sees_a_wrong_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from compose.cli.main import main\nimport compose.engine.attach\n")
    assert imported_parts(wrong) == {"cli", "engine"}
