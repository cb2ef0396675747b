"""Compose: adapter composition and mixtures of LoRA experts on one runtime.

Public names resolve on first use (PEP 562), so importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from pathlib import Path

# In a checkout the packages routers, retriever, kernels and hub_index lie beside this folder and are parts of
# this namespace (pyproject's package-dir); an installed wheel holds them inside it and this adds nothing.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "routers" / "__init__.py").exists() and not (_checkout / "compose" / "routers").exists():
    __path__.append(str(_checkout))

__version__ = "0.1.0"

_EXPORTS = {
    "Adapter": "compose.adapter",
    "LowRank": "compose.adapter",
    "Bank": "compose.bank",
    "Coefficients": "compose.engine.coefficients",
    "ComposeError": "compose.errors",
    "aggregate": "compose.engine.aggregate",
    "attach": "compose.engine.attach",
    "convert": "compose.engine.convert",
    "diagnose": "compose.engine.diagnostics",
    "merge": "compose.engine.merge",
    "merge_with_data": "compose.engine.data_merge",
    "extract": "compose.engine.extract",
    "few_shot_search": "compose.fewshot.run",
    "retrieve_and_generate": "compose.engine.retrieved",
    "soup_weights": "compose.engine.soup",
    "read_adapter": "compose.formats.peft",
    "write_adapter": "compose.formats.peft",
}

__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'compose' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
