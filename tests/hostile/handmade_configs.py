"""24 configurations beside sound or nearly sound weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from compose.bank import Bank
from compose.formats import format_of
from tests.hostile.adapters import (
    CONFIG,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Tensors,
    files_of,
    lora_tensors,
    weights_of,
    write,
)
from tests.hostile.handmade import Case
from tests.hostile.handmade_safetensors import same_values

BACKTRACKING = "(([a-z0-9_.])+)+X"
GOOD_WEIGHTS = files_of(lora_tensors())[WEIGHTS_NAME]


def _fields(name: str, fields: Mapping[str, Any], reason: str, check: Callable[[Bank], None] = same_values) -> Case:
    return Case(name, lambda folder: write(folder, files_of(lora_tensors(), **fields)), reason, check=check)


def _text(name: str, data: Callable[[], bytes], reason: str) -> Case:
    return Case(name, lambda folder: write(folder, {CONFIG_NAME: data(), WEIGHTS_NAME: GOOD_WEIGHTS}), reason)


def _tensors(name: str, change: Callable[[Tensors], Tensors], reason: str, **fields: Any) -> Case:
    def make(folder: Path) -> Path:
        return write(folder, files_of(change(lora_tensors()), **fields))

    return Case(name, make, reason)


def _json(fields: str) -> bytes:
    """The sound configuration with this text behind its other fields."""
    return (
        json.dumps({key: value for key, value in CONFIG.items() if key != "lora_alpha"}).encode()[:-1]
        + f", {fields}}}".encode()
    )


def _negative(bank: Bank) -> None:
    assert {update.scaling for update in bank[bank.names[0]].targets.values()} == {-2.0}


def _base_is_text(bank: Bank) -> None:
    assert bank.base == "../../../../etc"
    same_values(bank)


def _not_composed(bank: Bank) -> None:
    """The whole embedding is kept and told of; nothing that is composed knows it."""
    adapter = bank[bank.names[0]]
    assert list(adapter.full_modules) == ["m.wte.weight"]
    assert not any("wte" in target for target in bank.targets)
    same_values(bank)


def _whole_embedding(folder: Path) -> Path:
    tensors = {**lora_tensors(), "base_model.model.m.wte.weight": torch.ones(7, 5)}
    write(folder, files_of(tensors, modules_to_save=["wte"]))
    notes = format_of(folder).inspect(folder).notes
    assert any("never composed: m.wte.weight" in note for note in notes)
    return folder


def _much_work(folder: Path) -> Path:
    """40,000 literal keys for 400 targets: 16 million comparisons if every one were made."""
    tensors = {}
    for layer in range(400):
        tensors[f"base_model.model.m.layers.{layer}.q.lora_A.weight"] = torch.ones(2, 2)
        tensors[f"base_model.model.m.layers.{layer}.q.lora_B.weight"] = torch.ones(2, 2)
    pattern = {f"m.layers.{number:05}.q": 2 for number in range(40_000)}
    config = {**CONFIG, "target_modules": ["q"], "rank_pattern": pattern}
    return write(folder, {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: weights_of(tensors)})


EVIL_MAPPING = {"base_model_class": "system", "parent_library": "os"}

CONFIGS = [
    _fields("target_modules is a backtracking expression", {"target_modules": BACKTRACKING}, ""),
    _fields("a key of rank_pattern is a backtracking expression", {"rank_pattern": {BACKTRACKING: 2}}, ""),
    _fields("r of 400,000", {"r": 400_000}, "whole number from 1 to"),
    _fields("r of 0", {"r": 0}, "whole number from 1 to"),
    _fields("lora_alpha of 1e30", {"lora_alpha": 1e30}, "beyond the limit"),
    _text("lora_alpha is NaN", lambda: _json('"lora_alpha": NaN'), "NaN is not a JSON number"),
    _text("lora_alpha is 1e999", lambda: _json('"lora_alpha": 1e999'), "beyond float64"),
    _text("lora_alpha of 5,000 digits", lambda: _json('"lora_alpha": ' + "9" * 5000), "limit"),
    _fields("negative lora_alpha", {"lora_alpha": -4}, "", _negative),
    _fields("base is a path upwards", {"base_model_name_or_path": "../../../../etc"}, "", _base_is_text),
    _fields("base with terminal escapes", {"base_model_name_or_path": "a\x1b]0;x\x07\ud800"}, "printable"),
    _fields("a field nobody knows", {"note_to_self": "x"}, ""),
    _fields("a switch nobody knows", {"use_evil": True}, "unknown and looks like a variant"),
    _fields("auto_mapping names os.system", {"auto_mapping": EVIL_MAPPING}, ""),
    _fields("megatron_core names a module", {"megatron_core": "antigravity", "megatron_config": {"a": 1}}, ""),
    _fields("peft_type nobody knows", {"peft_type": "EVIL"}, "peft_type 'EVIL' is not supported"),
    Case("a whole embedding in modules_to_save", _whole_embedding, "", check=_not_composed),
    _tensors(
        "tensors of one target are missing",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if ".v." not in name},
        "target_modules names 'v', but no tensor",
    ),
    _tensors(
        "lora_A without lora_B",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora_A" in name},
        "no matching B tensor",
    ),
    _tensors(
        "tensors that belong to nothing",
        lambda tensors: {**tensors, "base_model.model.m.norm.weight": torch.ones(3)},
        "used by nothing",
    ),
    _text("a field twice", lambda: _json('"lora_alpha": 4, "lora_alpha": 4000'), "duplicate key 'lora_alpha'"),
    _text(
        "peft_type nested 900 times",
        lambda: _json('"lora_alpha": 4').replace(b'"LORA"', b"[" * 900 + b"]" * 900),
        "nested",
    ),
    _text("2 MiB", lambda: _json('"lora_alpha": 4, "x": "' + "x" * 2**21 + '"'), "more than the limit"),
    Case("16 million comparisons", _much_work, "comparisons are refused"),
]
