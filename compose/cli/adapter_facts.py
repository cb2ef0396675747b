"""Facts about one adapter folder for ``compose inspect``: a plain dict, the same for people and for ``--json``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.errors import AdapterFormatError

if TYPE_CHECKING:
    from compose.adapter import LowRank
    from compose.formats.header import AdapterHeader


def adapter_facts(folder: Path, *, norms: bool = False, hash_files: bool = False) -> dict[str, Any]:
    """Return what the headers of ``folder`` tell, and its problems instead of raising them.

    Args:
        folder: One adapter.
        norms: Also read the weights: Frobenius norms of the deltas, SHA-256, and whether every value is finite.
        hash_files: Also hash the weight file.
    """
    from compose.formats import format_of

    try:
        adapter_format = format_of(folder)
        header = adapter_format.inspect(folder)
        facts = _facts(header)
        if norms:
            adapter = adapter_format.read(folder, expected=header)
            facts["sha256"] = adapter.sha256
            _add_norms(facts, adapter.targets)
        elif hash_files:
            facts["sha256"] = adapter_format.file_sha256(header)
    except AdapterFormatError as error:
        return {**_nothing(folder), "problems": [str(error)]}
    return facts


def delta_norm(update: LowRank) -> float:
    """Frobenius norm of ``scaling * b @ a``, from the two ``(R, R)`` Gram matrices, in float64."""
    a, b = update.a.double(), update.b.double()
    square = ((b.T @ b) * (a @ a.T)).sum().item()
    return abs(update.scaling) * math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan


def _nothing(folder: Path) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(
        ("format", "base", "rank", "scaling", "dtype", "bytes", "parameters", "sha256", "norm")
    )
    lists: dict[str, Any] = {"targets": {}, "groups": [], "modules_to_save": [], "notes": [], "problems": []}
    return {"kind": "adapter", "name": folder.name, "folder": str(folder), "targets_count": 0, **empty, **lists}


def _facts(header: AdapterHeader) -> dict[str, Any]:
    targets: dict[str, dict[str, Any]] = {
        path: {
            "kind": target.kind,
            "rank": target.rank,
            "in_features": target.in_features,
            "out_features": target.out_features,
            "scaling": target.scaling,
            "dtype": str(target.dtype).removeprefix("torch."),
            "norm": None,
        }
        for path, target in header.targets.items()
    }
    parts = list(targets.values())
    return {
        **_nothing(header.folder),
        "name": header.name,
        "format": header.format,
        "base": header.base or None,
        "targets_count": len(targets),
        "rank": _span(one["rank"] for one in parts),
        "scaling": _span(one["scaling"] for one in parts),
        "dtype": ", ".join(sorted({one["dtype"] for one in parts})),
        "bytes": header.num_bytes,
        "parameters": sum(one["rank"] * (one["in_features"] + one["out_features"]) for one in parts),
        "modules_to_save": list(header.full_modules),
        "targets": targets,
        "groups": _groups(targets),
        "notes": list(header.notes),
    }


def _add_norms(facts: dict[str, Any], targets: Mapping[str, LowRank]) -> None:
    for path, update in targets.items():
        facts["targets"][path]["norm"] = delta_norm(update)
    sizes = {path: one["norm"] for path, one in facts["targets"].items()}
    facts["groups"] = _groups(facts["targets"])
    facts["norm"] = math.sqrt(sum(size**2 for size in sizes.values()))
    bad = [path for path, size in sizes.items() if not math.isfinite(size)]
    if bad:
        facts["problems"].append(
            f"{facts['folder']}: values that are not finite in {len(bad)} targets, first {bad[0]}"
        )
    if facts["norm"] == 0:
        facts["notes"].append("every delta is zero: this adapter changes nothing (an untrained b?)")


def _groups(targets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per module kind: targets whose paths differ only in numbers, and whose shapes agree."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for path, one in targets.items():
        shape = f"{one['in_features']} -> {one['out_features']}"
        found.setdefault((re.sub(r"\d+", "*", path), one["kind"], shape), []).append(one)
    return [
        {
            "pattern": pattern,
            "kind": kind,
            "shape": shape,
            "count": len(members),
            "rank": _span(one["rank"] for one in members),
            "scaling": _span(one["scaling"] for one in members),
            "norm": None if members[0]["norm"] is None else _span(one["norm"] for one in members),
        }
        for (pattern, kind, shape), members in found.items()
    ]


def _span(values: Iterable[float]) -> str:
    """Write the range of some numbers ("8", "2 to 16")."""
    low, high = min(found := list(values)), max(found)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
