"""What a merge leaves: an adapter's folder or a whole model, and the lines that tell of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.cli.console import note, print_facts, print_json, say

if TYPE_CHECKING:
    from compose.engine.merged import Merged
    from compose.fewshot.loading import LoadedModel


def load_stored(base: str) -> LoadedModel:
    """Load a model in the dtype it is stored in, so that it is written back as it was but for the merge."""
    from transformers import AutoConfig

    from compose.cli.loading import load_base

    dtype = str(getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "dtype", None)).removeprefix(
        "torch."
    )
    return load_base(base, dtype=dtype if dtype in ("float32", "bfloat16", "float16") else "auto")


def write_model(merged: Merged, loaded: LoadedModel, out: Path, beside: Mapping[str, bytes]) -> None:
    """Write the model with the deltas in its weights, and files beside it; the folder appears whole or not at all."""
    merged.merge_into(loaded.model)
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        loaded.model.save_pretrained(fresh)
        loaded.tokenizer.save_pretrained(fresh)
        loaded.prompt_format.save(fresh)
        merged.write_recipe(fresh, beside=beside)
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def show_result(merged: Merged, out: Path, into_base: str | None, json: bool, *, report: bool) -> None:
    """Print what was written, and what recompression lost."""
    worst = max(merged.targets.items(), key=lambda item: item[1].error, default=None)
    facts: dict[str, Any] = {
        "written": str(out),
        "kind": "model" if into_base else "adapter",
        "method": merged.recipe["method"],
        "targets": len(merged.targets),
        "rank": None if into_base else max(merged.adapter.ranks.values()),
        "lost by recompression": merged.relative_error if merged.low_rank else 0.0,
    }
    if json:
        print_json({**facts, "recipe": merged.recipe})
        return
    facts["lost by recompression"] = f"{100 * facts['lost by recompression']:.2f} % of the norm"
    print_facts(facts)
    if worst is not None and worst[1].error > 0.0:
        note(f"most is lost at {worst[0]}: {100 * worst[1].error:.1f} %")
    if not into_base:
        say(f"use it: compose generate --base MODEL --bank {out} --adapter {out.name} --prompt TEXT")
    if report:
        say(f"report: {out / 'report.html'}")
    say(f"repeat it: compose merge -c {out / 'merge.json'} --bank DIR --out OTHER")
