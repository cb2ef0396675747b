"""What ``compose.routers`` exports: every name resolves, to what a reader expects, and importing costs nothing."""

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

from compose import routers

PROMISED = {
    "MixedExample",
    "MixtureSpec",
    "PRESETS",
    "Preset",
    "RoutedModel",
    "RouterTrainer",
    "Routing",
    "RoutingContext",
    "RoutingMeter",
    "Sampling",
    "Stage",
    "TrainSettings",
    "build",
    "calibrate",
    "experts_for",
    "fresh_experts",
    "linear_targets",
    "load",
    "prepare",
    "preset",
    "read_mixed",
    "router_collator",
    "save",
    "subtract_general",
    "train",
    "train_phatgoose_gates",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", routers.__all__)
def test_every_name_resolves_to_what_its_module_defines(name) -> None:
    value = getattr(routers, name)
    assert not isinstance(value, ModuleType)
    assert value is getattr(importlib.import_module(routers._EXPORTS[name]), name)
    if callable(value):  # exported from where it is defined, so that help and errors name one place
        assert value.__module__ == routers._EXPORTS[name]
    assert value.__doc__


def test_what_is_promised_is_exported_and_listed() -> None:
    assert sorted(routers.__all__) == routers.__all__ == dir(routers)
    assert sorted(PROMISED - set(routers.__all__)) == []


def test_no_submodule_has_the_name_of_an_export() -> None:
    """Importing ``compose.routers.build`` would put the module where the function was."""
    modules = {module.name for module in pkgutil.iter_modules(routers.__path__)}
    assert modules & set(routers.__all__) == set()
    assert len(modules) > 40


def test_names_survive_the_import_of_every_submodule() -> None:
    for module in pkgutil.walk_packages(routers.__path__, "compose.routers."):
        importlib.import_module(module.name)
    assert callable(routers.build)
    assert callable(routers.train)
    assert callable(routers.calibrate)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'built'"):
        routers.built  # noqa: B018 - the look-up is what is tested


def test_importing_loads_neither_torch_nor_transformers() -> None:
    code = "import compose.routers, sys; dir(compose.routers); print([m for m in {} if m in sys.modules])"
    assert run(code.format(("torch", "transformers", "numpy"))) == "[]"


def test_a_specification_needs_no_transformers() -> None:
    code = "import sys; from compose import routers; routers.preset('mola').to_json(); print(sys.modules.keys())"
    assert "'transformers'" not in run(code)
