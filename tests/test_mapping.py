"""The traps of mapping five top-level folders into one namespace (DESIGN, Folders)."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, cwd: Path, *, safe_path: bool = False) -> str:
    """Run ``code`` in a fresh interpreter with ``cwd`` on ``sys.path``, unless ``safe_path``."""
    command = [sys.executable, *(["-P"] if safe_path else []), "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_packages_resolve_from_the_checkout_and_from_elsewhere(tmp_path: Path) -> None:
    code = "import compose.routers, compose.kernels.stack, compose.hub_index, compose.retriever; print('ok')"
    assert run(code, ROOT) == "ok"
    assert run(code, tmp_path) == "ok"


def test_importing_compose_is_inert() -> None:
    code = (
        "import compose, sys; dir(compose); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert run(code, ROOT) == "[]"


def test_the_kernels_package_is_only_a_docstring() -> None:
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


def test_a_model_imports_when_hugging_face_kernels_is_installed(tmp_path: Path) -> None:
    """Their metadata is present and the tests' process runs without the checkout on ``sys.path`` (conftest, -P)."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(
        "class _Any:\n    def __init__(self, *a, **k): pass\n    def __call__(self, f): return f\n"
        "def __getattr__(name):\n    if name.startswith('__'):\n        raise AttributeError(name)\n    return _Any\n"
    )
    info = site / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import compose.kernels.stack, kernels\n"
        "from transformers import LlamaForCausalLM\n"
        f"assert kernels.__file__.startswith({str(site)!r}), kernels.__file__\n"
        "print(LlamaForCausalLM.__name__)"
    )
    assert run(code, ROOT, safe_path=True) == "LlamaForCausalLM"


def test_pytest_itself_runs_without_the_checkout_on_the_path() -> None:
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]
