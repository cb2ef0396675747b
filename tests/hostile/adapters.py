"""Tiny sound adapters, one per kind and dtype, as the bytes of their files: what the suite damages."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from compose.adapter import Adapter, LowRank
from compose.formats.compeft import compeft_files

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
OUT, IN, RANK, ALPHA = 5, 6, 2, 4
SCALING = ALPHA / RANK
TARGETS = ("m.layers.0.q", "m.layers.0.v")
CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["q", "v"],
    "base_model_name_or_path": "toy",
}

Files = dict[str, bytes]
Tensors = dict[str, torch.Tensor]


def lora_tensors(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensors:
    """Return the factors of both targets, A ``(RANK, IN)`` and B ``(OUT, RANK)``, under PEFT's names."""
    shapes = {"lora_A.weight": (RANK, IN), "lora_B.weight": (OUT, RANK)}
    return _random({f"{path}.{part}": shape for path in TARGETS for part, shape in shapes.items()}, dtype, seed)


def files_of(tensors: Mapping[str, torch.Tensor], **fields: Any) -> Files:
    """Return a PEFT folder's files: `CONFIG` with ``fields`` above it, and the tensors."""
    return {CONFIG_NAME: json.dumps({**CONFIG, **fields}).encode(), WEIGHTS_NAME: weights_of(tensors)}


def weights_of(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return a weight file with PEFT's metadata."""
    return safetensors.torch.save(dict(tensors), metadata={"format": "pt"})


def raw(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file with this header (bytes, or what becomes JSON), whatever it says about ``data``."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts_of(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a sound weight file."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write the files into ``folder``, which is made where it is missing."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _random(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{name}": torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def _embedding() -> Files:
    tensors = lora_tensors()
    tensors |= _random({"m.embed_tokens.lora_embedding_A": (RANK, 7), "m.embed_tokens.lora_embedding_B": (OUT, RANK)})
    return files_of(tensors, target_modules=["q", "v", "embed_tokens"])


def _whole_module() -> Files:
    return files_of(lora_tensors() | _random({"score.weight": (3, OUT)}), modules_to_save=["score"])


def _patterns() -> Files:
    tensors = lora_tensors()
    tensors |= _random({"m.layers.0.k.lora_A.weight": (1, IN), "m.layers.0.k.lora_B.weight": (OUT, 1)})
    patterns = {"rank_pattern": {"layers.0.k": 1}, "alpha_pattern": {"^m.layers.0.v": 3}}
    return files_of(tensors, target_modules=["q", "k", "v"], use_rslora=True, **patterns)


def _adalora() -> Files:
    shapes = {"lora_A": (RANK, IN), "lora_B": (OUT, RANK), "lora_E": (RANK, 1)}
    tensors = _random({f"{path}.{part}": shape for path in TARGETS for part, shape in shapes.items()})
    return files_of(tensors, peft_type="ADALORA", init_r=RANK, target_r=RANK)


def _vera() -> Files:
    shapes: dict[str, tuple[int, ...]] = {"vera_lambda_b": (OUT,), "vera_lambda_d": (RANK,)}
    tensors = _random({f"{path}.{part}": shape for path in TARGETS for part, shape in shapes.items()})
    shared = _random({"vera_A": (RANK, IN), "vera_B": (OUT, RANK)})
    tensors |= {name.replace("base_model.model.", "base_model."): tensor for name, tensor in shared.items()}
    config = {"peft_type": "VERA", "r": RANK, "target_modules": ["q", "v"], "base_model_name_or_path": "toy"}
    return {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: weights_of(tensors)}


def _loha() -> Files:
    shapes = {"hada_w1_a": (OUT, 1), "hada_w1_b": (1, IN), "hada_w2_a": (OUT, 1), "hada_w2_b": (1, IN)}
    return _lycoris("LOHA", shapes)


def _lokr() -> Files:
    return _lycoris("LOKR", {"lokr_w1": (1, 2), "lokr_w2_a": (OUT, 1), "lokr_w2_b": (1, 3)})


def _lycoris(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Files:
    tensors = _random({f"{path}.{part}": shape for path in TARGETS for part, shape in shapes.items()})
    config = {"peft_type": kind, "r": 1, "alpha": 2, "target_modules": ["q", "v"], "base_model_name_or_path": "toy"}
    return {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: weights_of(tensors)}


def _compeft() -> Files:
    ternary = {
        path: LowRank(torch.tensor([[0.5, 0, 0, -0.5, 0, 0]] * RANK), torch.tensor([[0.25, 0]] * OUT), SCALING)
        for path in TARGETS
    }
    return dict(compeft_files(Adapter("x", "toy", ternary)))


SEEDS: Mapping[str, Callable[[], Files]] = {
    "float32": lambda: files_of(lora_tensors()),
    "bfloat16": lambda: files_of(lora_tensors(torch.bfloat16)),
    "float16": lambda: files_of(lora_tensors(torch.float16)),
    "embedding": _embedding,
    "whole module": _whole_module,
    "patterns": _patterns,
    "AdaLoRA": _adalora,
    "VeRA": _vera,
    "LoHa": _loha,
    "LoKr": _lokr,
    "ComPEFT": _compeft,
}
"""Kind -> the files of a sound adapter over one base; every one of them is accepted."""


@cache
def seed_files(kind: str) -> Mapping[str, bytes]:
    """Return the files of one of `SEEDS`."""
    return SEEDS[kind]()
