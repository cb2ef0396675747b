"""The wheel holds every package and the demo's data, and works where it is installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("routers", "retriever", "kernels", "hub_index")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, built from a copy of the sources, was installed."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    sources = tmp_path_factory.mktemp("sources") / "copy"  # a build folder left in the checkout could hide a gap
    skipped = shutil.ignore_patterns(".venv", ".git", ".scratch", ".whl", "build", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, sources, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "-w", str(wheels), str(sources)]
    subprocess.run(build, check=True, capture_output=True, timeout=600)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, capture_output=True
    )
    return target


def expected_files() -> set[str]:
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "compose").rglob("*.py")}
    outside = {f"compose/{path.relative_to(ROOT)}" for folder in OUTSIDE for path in (ROOT / folder).rglob("*.py")}
    demo = ROOT / "compose" / "demo"
    data = {str(p.relative_to(ROOT)) for part in ("base", "bank") for p in (demo / part).rglob("*") if p.is_file()}
    assert len(data) > 50
    return inside | outside | data | {"compose/py.typed"}


def test_the_wheel_is_complete(installed: Path) -> None:
    held = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    assert sorted(expected_files() - held) == []


def test_the_installed_package_imports_and_answers(installed: Path, tmp_path: Path) -> None:
    code = (
        "import compose, compose.routers, compose.kernels.grouped_lora.op, compose.search, compose.cli.main\n"
        "from compose.demo.assets import demo_bank\n"
        "print(compose.__file__, len(compose.Bank.open(demo_bank())))"
    )
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    path, count = done.stdout.split()
    assert Path(path).is_relative_to(installed)
    assert int(count) >= 24
