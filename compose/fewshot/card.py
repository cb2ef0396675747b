"""The model card of a composed adapter: Hugging Face front matter, how it was made, and its lineage by hash."""

from __future__ import annotations

import json
from typing import Any


def card(report: dict[str, Any]) -> str:
    """Return ``README.md`` of a run folder."""
    front = {
        "base_model": report["base"]["id"],
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "adapter-compose", "few-shot-search"],
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value)
    search, output = report["search"], report["output"]
    made = "The base model was chosen: nothing beat it on the examples, so this folder holds no adapter."
    if output is not None:
        made = (
            f"A LoRA adapter composed from {_used(report)} trained adapters ({output['combine']} combined, ranks "
            f"{output['rank_min']} to {output['rank_max']}, {output['targets']} targets)."
        )
    found = (
        f"Found by few-shot search on {report['data']['examples']} examples "
        f"({search['cost']:.0f} forward-equivalents, {search['evaluations']} evaluations)."
    )
    return "\n".join(
        [
            "---",
            head,
            "---",
            "",
            "# Composed adapter",
            "",
            made,
            found,
            f"Choice: {search['reason']}.",
            "",
            "## Lineage",
            "",
            "| adapter | sha256 | weight |",
            "| --- | --- | --- |",
            *_lineage(report),
            "",
            "Settings, controls and losses: `report.json`; every evaluation: `events.jsonl`.",
            "",
        ]
    )


def _columns(report: dict[str, Any]) -> list[tuple[str, list[float]]]:
    weights = report["weights"]
    columns = zip(*weights["values"], strict=True)
    return [(name, list(column)) for name, column in zip(weights["adapters"], columns, strict=True) if any(column)]


def _used(report: dict[str, Any]) -> int:
    return len(_columns(report))


def _lineage(report: dict[str, Any]) -> list[str]:
    hashes = {row["name"]: row["sha256"] for row in report["bank"]["adapters"]}
    rows = []
    for name, column in _columns(report):
        spread = f"{column[0]:.4f}" if len(set(column)) == 1 else f"{min(column):.4f} to {max(column):.4f} by layer"
        rows.append(f"| {name} | `{hashes[name]}` | {spread} |")
    return rows
