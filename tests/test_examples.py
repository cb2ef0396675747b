"""Every example runs offline and prints something."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples_and_the_readme_lists_them_all() -> None:
    readme = (ROOT / "examples" / "README.md").read_text()
    assert len(EXAMPLES) >= 3
    assert [path.name for path in EXAMPLES if f"`{path.name}`" not in readme] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, tmp_path: Path, warm_python) -> None:
    done = warm_python.run(path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 4
