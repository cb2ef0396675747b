"""A base model as an audit needs it: the shapes of its layers from the headers of its checkpoint, and their norms.

No model is built. Module paths of an adapter and of a checkpoint can differ by a leading part (``transformer.h.0`` and
``h.0``); `BaseModel.find` bridges that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compose.errors import AdapterFormatError, IncompatibleError
from compose.files.safetensors_file import DTYPES, read_bytes
from compose.formats.peft_keys import EMBEDDING_NAMES
from compose.hub_index.audit.raw_header import RawHeader, RawTensor, read_raw_header, read_tensor_bytes

_MAX_JSON_BYTES = 64 * 2**20
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_TIED_OUTPUTS = frozenset({"lm_head", "embed_out"})
_TOKENS = EMBEDDING_NAMES - _TIED_OUTPUTS - {"wpe"}


class BaseLayer(NamedTuple):
    """One weight of the base model.

    Attributes:
        out_features: ``O``.
        in_features: ``I``.
        file: Where it lies.
        header: Of that file.
        tensor: Its entry.
    """

    out_features: int
    in_features: int
    file: Path
    header: RawHeader
    tensor: RawTensor

    def norm(self) -> float:
        """Return the Frobenius norm of the weight, in float64; its bytes alone are read."""
        data = bytearray(read_tensor_bytes(self.file, self.header, self.tensor))
        return float(torch.frombuffer(data, dtype=DTYPES[self.tensor.dtype]).double().norm())


@dataclass(frozen=True, eq=False)
class BaseModel:
    """The layers of one base model.

    Attributes:
        name: As it was given.
        model_type: Of its configuration, ``""`` when unknown.
        layers: Module path in the checkpoint -> its weight; matrices only.
        local: Whether the name is that of a folder, which says nothing of whose model it is.
    """

    name: str
    model_type: str
    layers: Mapping[str, BaseLayer]
    local: bool = True
    _norms: dict[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path_or_id: str | Path) -> BaseModel:
        """Read the headers of a local folder, or of a model in the cache of Hugging Face.

        Raises:
            IncompatibleError: There is none, or its checkpoint is not in safetensors.
        """
        folder = _folder_of(path_or_id)
        config = _json(folder / "config.json")
        kind = config.get("model_type")
        layers: dict[str, BaseLayer] = {}
        for file in _checkpoint(folder):
            header = read_raw_header(file)
            if header.problem or header.malformed or not header.whole:
                raise IncompatibleError(f"{file}: not a sound safetensors file; give another --base")
            for tensor in header.tensors:
                if len(tensor.shape) == 2 and tensor.name.endswith(".weight") and tensor.dtype in DTYPES:
                    out, wide = tensor.shape[::-1] if kind in _CONV1D_MODELS and _is_conv1d(tensor) else tensor.shape
                    layers[tensor.name.removesuffix(".weight")] = BaseLayer(out, wide, file, header, tensor)
        return cls(str(path_or_id), kind if isinstance(kind, str) else "", layers, Path(path_or_id).is_dir())

    def norm(self, module: str) -> float | None:
        """Return the Frobenius norm of the weight that a module path means; None when the model has none."""
        layer = self.find(module)
        if layer is None:
            return None
        if module not in self._norms:
            self._norms[module] = layer.norm()
        return self._norms[module]

    def find(self, module: str) -> BaseLayer | None:
        """Return the layer an adapter's module path means; None when the model has none.

        The leading part of either path may be missing in the other. An output matrix that is not in the checkpoint is
        the embedding, to which it is tied.
        """
        if module in self.layers:
            return self.layers[module]
        segments = module.split(".")
        for start in range(1, len(segments)):
            shorter = ".".join(segments[start:])
            if shorter in self.layers and any(part.isdecimal() for part in segments[start:]):
                return self.layers[shorter]
        longer = [path for path in self.layers if path.endswith(f".{module}")]
        if len(longer) == 1:
            return self.layers[longer[0]]
        if segments[-1] in _TIED_OUTPUTS:
            return next((self.layers[path] for path in self.layers if path.rpartition(".")[2] in _TOKENS), None)
        return None


def _is_conv1d(tensor: RawTensor) -> bool:
    """GPT-2 keeps the weights of its blocks as (in, out); embeddings and the head are (out, in) as everywhere."""
    return any(part.startswith("c_") for part in tensor.name.split("."))


def _folder_of(path_or_id: str | Path) -> Path:
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(path_or_id), "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise IncompatibleError(
            f"base model {str(path_or_id)!r:.200} is neither a folder nor in the cache of Hugging Face; give a local "
            "folder, or download it first (hf download NAME)"
        )
    return Path(found).parent


def _checkpoint(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = _json(index).get("weight_map", {})
        names = sorted({one for one in shards.values() if isinstance(one, str) and Path(one).name == one})
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise IncompatibleError(f"{folder}: no model.safetensors (or its index); the audit reads base models from these")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bytes(path, max_bytes=_MAX_JSON_BYTES))
    except (AdapterFormatError, ValueError, RecursionError) as error:
        raise IncompatibleError(f"{path}: cannot be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}
