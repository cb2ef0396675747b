"""``compose doctor``: what this installation has, and what is missing."""

from __future__ import annotations

import os
import platform
from typing import Annotated, Any

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import print_facts, print_json, say
from compose.cli.demo_files import demo_state


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, devices and settings, for a bug report or a first look."""
    facts = collect()
    if json:
        print_json(facts)
        return
    for title, part in facts.items():
        print_facts({name: _text(value) for name, value in part.items()}, title=title)
        say("")


def collect() -> dict[str, dict[str, Any]]:
    """Return the facts by section."""
    return {"versions": _versions(), "torch": _torch(), "environment": _environment(), "demo": demo_state()}


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    import compose

    found: dict[str, str | None] = {"compose": compose.__version__, "python": platform.python_version()}
    for package in (
        "torch",
        "transformers",
        "safetensors",
        "numpy",
        "scipy",
        "cma",
        "triton",
        "peft",
        "typer",
        "rich",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _torch() -> dict[str, Any]:
    import importlib.util

    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "cpu cores": os.cpu_count(),
        "gpus": gpus,
        "triton": importlib.util.find_spec("triton") is not None,
    }


def _environment() -> dict[str, Any]:
    names = ("HF_HUB_OFFLINE", "HF_HOME", "NO_COLOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    platform_name = platform.platform()
    return {"platform": platform_name, **{name: os.environ.get(name) for name in names}}


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


COMMANDS.register("doctor")(Command(doctor, examples=("compose doctor", "compose doctor --json")))
