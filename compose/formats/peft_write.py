"""The two files of a PEFT LoRA folder, from an adapter with any ranks and scalings."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from compose.adapter import Adapter
from compose.errors import AdapterFormatError
from compose.formats.header import natural_key
from compose.formats.peft_config import LoraConfig, check_full_modules, check_targets, is_inside, parse_config
from compose.formats.peft_keys import is_embedding_copy

PREFIX = "base_model.model."
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")


def weights_bytes(adapter: Adapter) -> bytes:
    """Return ``adapter_model.safetensors``: PEFT's names, values and dtypes as they are."""
    tensors = {}
    for path, update in adapter.targets.items():
        a_suffix, b_suffix = _LINEAR if update.kind == "linear" else _EMBEDDING
        tensors[f"{PREFIX}{path}{a_suffix}"] = update.a
        tensors[f"{PREFIX}{path}{b_suffix}"] = update.b
    tensors |= {f"{PREFIX}{path}": tensor for path, tensor in adapter.full_modules.items()}
    return safetensors.torch.save(_apart(tensors), metadata={"format": "pt"})


def config_bytes(adapter: Adapter) -> bytes:
    """Return ``adapter_config.json``.

    The source configuration goes back verbatim while it still describes the tensors. Otherwise it is kept with the
    fields that decide the maths rewritten: the most common rank and scaling become ``r`` and ``lora_alpha``, every
    deviating target gets an escaped ``^full.path`` key in ``rank_pattern`` and ``alpha_pattern``.

    Raises:
        AdapterFormatError: The source configuration is not plain LoRA, so rewriting would drop something.
    """
    config = dict(adapter.config)
    if config and _describes(config, adapter):
        if adapter.source is not None and json.loads(adapter.source.config_text) == config:
            return adapter.source.config_text.encode()
        return _dump(config)
    parse_config({**_PLAIN, **config})
    return _dump({**_PLAIN, **config, **_maths(adapter)})


_PLAIN: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "revision": None,
    "task_type": None,
}


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return dense CPU tensors that share no memory, which safetensors refuses; only sharing ones are copied."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        memory = dense.untyped_storage().data_ptr()
        apart[name] = dense.clone() if memory in seen else dense
        seen.add(memory)
    return apart


def _dump(config: Mapping[str, Any]) -> bytes:
    """PEFT's own layout, so that unchanged files compare equal."""
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()


def _describes(config: Mapping[str, Any], adapter: Adapter) -> bool:
    """Return whether ``config`` as it stands gives exactly the adapter's base, targets, ranks and scalings."""
    try:
        parsed = parse_config(config)
        return (
            adapter.base in ("", parsed.base)
            and not check_targets(parsed, list(adapter.targets))
            and not check_full_modules(parsed, list(adapter.full_modules))
            and _lists_targets(parsed, adapter)
            and all(parsed.scaling(path, update.rank) == update.scaling for path, update in adapter.targets.items())
        )
    except AdapterFormatError:
        return False


def _lists_targets(parsed: LoraConfig, adapter: Adapter) -> bool:
    """Return whether the configuration surely targets what the adapter has; an expression does for its source's."""
    return parsed.targets is not None if adapter.source is None else _has_source_targets(adapter)


def _has_source_targets(adapter: Adapter) -> bool:
    return adapter.source is not None and frozenset(adapter.source.targets) == adapter.targets.keys()


def _maths(adapter: Adapter) -> dict[str, Any]:
    """Fields that give every target its rank and scaling; nothing is known of the base's other modules."""
    updates = adapter.targets
    alphas = {path: exact_alpha(update.scaling, update.rank) for path, update in updates.items()}
    (rank, alpha), _ = Counter((updates[path].rank, alphas[path]) for path in updates).most_common(1)[0]
    targeting = {
        "target_modules": sorted(updates, key=natural_key),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return {
        **({} if _has_source_targets(adapter) else targeting),
        "base_model_name_or_path": adapter.base or adapter.config.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "init_lora_weights": True,  # PEFT runs it again at loading; "orthogonal" then fails on odd ranks
        "rank_pattern": {_anchored(path): update.rank for path, update in updates.items() if update.rank != rank},
        "alpha_pattern": {_anchored(path): value for path, value in alphas.items() if value != alpha},
        "modules_to_save": _modules_to_save(adapter),
    }


def exact_alpha(scaling: float, rank: int) -> float:
    """Return the alpha with ``alpha / rank == scaling``, or one rounding of float64 off where none exists."""
    nearest = scaling * rank
    tries = (nearest, math.nextafter(nearest, math.inf), math.nextafter(nearest, -math.inf))
    alpha = min(tries, key=lambda value: abs(value / rank - scaling))
    return int(alpha) if alpha.is_integer() and abs(alpha) < 2**53 else alpha


def _anchored(path: str) -> str:
    return "^" + re.escape(path)


def _modules_to_save(adapter: Adapter) -> list[str] | None:
    """Keep the source's list while it covers the full modules exactly, else name every full parameter's module."""
    listed = adapter.config.get("modules_to_save") or []
    embeddings = [path for path, update in adapter.targets.items() if update.kind == "embedding"]
    plain = [path for path in adapter.full_modules if not is_embedding_copy(path, embeddings)]
    covered = all(any(is_inside(path, name) for name in listed) for path in plain)
    if covered and all(any(is_inside(path, name) for path in adapter.full_modules) for name in listed):
        return listed or None
    return sorted({path.rpartition(".")[0] for path in plain}, key=natural_key) or None
