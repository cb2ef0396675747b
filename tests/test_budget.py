"""Files stay under 500 lines and functions under 60 (docstrings not counted)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("compose", "routers", "retriever", "kernels", "hub_index", "benchmarks", "examples", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def long_functions(source: str, limit: int = 60) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)
            if lines > limit:
                found.append(f"{node.name}: {lines} lines")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_and_functions_are_within_budget(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 500
    assert long_functions(source) == []


def test_the_check_sees_a_long_function() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 60) == ["f: 61 lines"]
