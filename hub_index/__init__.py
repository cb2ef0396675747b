"""The index of known adapters. Public names resolve on first use (PEP 562); opening and asking it loads no torch."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "Added": "changes",
    "AdapterRecord": "records",
    "AdapterSummary": "records",
    "AuditFinding": "records",
    "EmbeddingRecord": "records",
    "ExampleRecord": "records",
    "Filters": "search",
    "Hit": "search",
    "Index": "store",
    "LineageRecord": "records",
    "ModuleRecord": "records",
    "ScoreRecord": "records",
    "StatRecord": "records",
    "Swept": "changes",
    "check_lock": "lockfile",
    "export_jsonl": "exchange",
    "import_jsonl": "exchange",
    "lock_adapter": "lockfile",
    "read_lock": "lockfile",
    "write_lock": "lockfile",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'compose.hub_index' has no attribute {name!r}")
    return getattr(importlib.import_module(f"compose.hub_index.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
