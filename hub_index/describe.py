"""What the files of an adapter say, as the fields of a record: its targets, ranks, scalings, kind and base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from compose.files import safetensors_file as files
from compose.formats.header import AdapterHeader, FullTensorHeader
from compose.formats.peft_source import KindHeader
from compose.hub_index.records import MAX_LINE, ModuleRecord, is_text

MAX_SCALINGS = 1000
MAX_METADATA = 100
_DTYPE_NAMES = {dtype: name for name, dtype in files.DTYPES.items()}
_FLAGS = {"use_dora": "dora", "use_rslora": "rslora", "fan_in_fan_out": "fan_in_fan_out", "enable_lora": "fused"}


def modules_of(header: AdapterHeader) -> tuple[ModuleRecord, ...]:
    """Return the targets of an adapter that opens as it is, then its whole replaced weights."""
    found = [
        ModuleRecord(
            name=path,
            kind=one.kind,
            in_features=one.in_features,
            out_features=one.out_features,
            rank=one.rank,
            scaling=one.scaling,
        )
        for path, one in header.targets.items()
    ]
    return (*found, *_whole(header.full_modules, {one.name for one in found}))


def modules_of_kind(header: KindHeader) -> tuple[ModuleRecord, ...]:
    """Return the targets of an adapter of another kind; widths that only its base model tells are 0."""
    vector, dora = header.title == "IA3", header.title == "DoRA"
    found = [
        ModuleRecord(
            name=path,
            kind="vector" if vector else one.kind,
            in_features=one.in_features,
            out_features=one.out_features,
            rank=header.ranks[path],
            scaling=one.scaling,
            has_dora=dora,
        )
        for path, one in header.targets.items()
    ]
    return (*found, *_whole(header.full_modules, {one.name for one in found}))


def shape_fields(modules: Iterable[ModuleRecord]) -> dict[str, Any]:
    """Return ``rank_min``, ``rank_max``, ``scaling`` and ``modules_to_save`` of a record with these modules."""
    targets = [one for one in modules if one.kind != "full"]
    ranks = [one.rank for one in targets]
    return {
        "rank_min": min(ranks, default=0),
        "rank_max": max(ranks, default=0),
        "scaling": _scalings(targets),
        "modules_to_save": tuple(one.name for one in modules if one.kind == "full"),
    }


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record takes from an adapter's configuration; fields of a wrong type are left out."""
    flags = [flag for key, flag in _FLAGS.items() if config.get(key)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and is_text(init, 60):
        flags.append(f"init:{init}")
    return {
        "base_id": _text(config.get("base_model_name_or_path")),
        "base_revision": _text(config.get("revision")),
        "peft_type": _text(config.get("peft_type")),
        "task_type": _text(config.get("task_type")),
        "flags": tuple(flags),
    }


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Return names such as ``"BF16"``, several joined by commas."""
    return ",".join(sorted({_DTYPE_NAMES.get(dtype, str(dtype)) for dtype in dtypes}))


def metadata_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a weight file's metadata without what every file has, short entries alone."""
    kept = {
        key: value
        for key, value in metadata.items()
        if key != "format" and is_text(key, 200) and is_text(value, MAX_LINE)
    }
    return dict(list(kept.items())[:MAX_METADATA])


def _whole(full: Mapping[str, FullTensorHeader], taken: set[str]) -> list[ModuleRecord]:
    """Return whole weights by their parameter's path; a path that is a target's too keeps the parameter's name."""
    found = []
    for path, one in full.items():
        out, inside = (*one.shape, 0)[:2] if len(one.shape) <= 2 else (one.shape[0], 0)
        if path not in taken:
            found.append(ModuleRecord(name=path, kind="full", in_features=inside, out_features=out))
    return found


def _scalings(targets: list[ModuleRecord]) -> dict[str, float]:
    """Return ``"*"`` with the most frequent multiplier, then the modules that have another."""
    counted = Counter(one.scaling for one in targets)
    if not counted:
        return {}
    ((usual, _),) = counted.most_common(1)
    others = {one.name: one.scaling for one in targets if one.scaling != usual}
    return {"*": usual, **dict(list(others.items())[:MAX_SCALINGS])}


def _text(value: Any) -> str:
    return value if is_text(value, MAX_LINE) else ""
