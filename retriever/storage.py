"""Retrievers as folders: ``retriever.json`` and ``vectors.safetensors``, published by one rename."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compose.errors import AdapterFormatError, ComposeError, IncompatibleError
from compose.files.publish import publish_folder
from compose.files.strict_json import parse_object
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Embedding, Moments
from compose.retriever.encoders import Encoder
from compose.retriever.scope import Scope

if TYPE_CHECKING:
    from compose.retriever.retriever import Retriever

FACTS_FILE = "retriever.json"
VECTORS_FILE = "vectors.safetensors"
VERSION = 1
_MAX_FACTS_BYTES = 256 * 2**20
_FIELDS = {"version", "encoder", "names", "method", "options", "counts", "unit_queries", "backend", "scope"}


def save(retriever: Retriever, folder: Path, *, overwrite: bool) -> Path:
    """Write ``folder``; see `compose.retriever.retriever.Retriever.save`."""
    from safetensors.numpy import save as to_bytes

    fitted = retriever.fitted
    tensors = {"vectors": fitted.vectors, "bias": fitted.bias}
    if fitted.moments is not None:
        tensors |= {f"moments_{part.name}": getattr(fitted.moments, part.name) for part in fields(Moments)}
    facts = {
        "version": VERSION,
        "encoder": describe(retriever.encoder),
        "names": list(retriever.names),
        "method": method_name(retriever.method),
        "options": asdict(retriever.method),  # type: ignore[call-overload]
        "counts": np.bincount(fitted.owners).tolist(),
        "unit_queries": fitted.unit_queries,
        "backend": retriever.backend,
        "scope": None if retriever.scope is None else asdict(retriever.scope),
    }
    content = json.dumps(facts, ensure_ascii=False, indent=1, allow_nan=False).encode()
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return publish_folder({FACTS_FILE: content, VECTORS_FILE: to_bytes(arrays)}, folder, overwrite=overwrite)


def load(folder: Path, encoder: Encoder) -> Retriever:
    """Read ``folder``; see `compose.retriever.retriever.Retriever.load`."""
    from compose.retriever.retriever import Retriever

    facts = read_facts(folder)
    check_encoder(facts["encoder"], encoder, folder)
    try:
        method = ADAPTER_EMBEDDINGS[facts["method"]](**facts["options"])
        fitted = _fitted(folder, facts, encoder.dim)
        scope = None if facts["scope"] is None else Scope(**facts["scope"])
    except (TypeError, KeyError, ValueError) as error:
        raise AdapterFormatError(f"{folder}: {error}") from error
    return Retriever(encoder, tuple(facts["names"]), method, fitted, facts["backend"], scope)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the checked content of ``retriever.json``: names, method, and which encoder made the vectors.

    Raises:
        AdapterFormatError: It is missing, damaged, or written by a newer version.
    """
    from compose.files.safetensors_file import read_bytes

    path = folder / FACTS_FILE
    facts = parse_object(read_bytes(path, max_bytes=_MAX_FACTS_BYTES), path)
    if facts.get("version") != VERSION:
        raise AdapterFormatError(
            f"{path}: version {facts.get('version')!r:.40}, this release reads {VERSION}; fit the retriever again, or "
            "update compose"
        )
    missing = sorted(_FIELDS - facts.keys())
    if missing:
        raise AdapterFormatError(f"{path}: missing {missing}")
    names, counts = facts["names"], facts["counts"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise AdapterFormatError(f"{path}: names must be a list of names")
    fine = isinstance(counts, list) and len(counts) == len(names) and all(type(n) is int and n > 0 for n in counts)
    if len(set(names)) != len(names) or not fine:
        raise AdapterFormatError(f"{path}: names must be distinct, with one positive count each")
    return facts


def describe(encoder: Encoder) -> dict[str, Any]:
    """Return what identifies an encoder."""
    return {"id": encoder.id, "fingerprint": encoder.fingerprint, "prompt": encoder.prompt, "dim": encoder.dim}


def check_encoder(stored: Mapping[str, Any], encoder: Encoder, where: object) -> None:
    """Raise unless ``encoder`` is the one that made stored vectors; its name may differ, nothing else.

    Raises:
        IncompatibleError: Fingerprint, prompt or width differ; the message shows both sides.
    """
    given = describe(encoder)
    different = [name for name in ("fingerprint", "prompt", "dim") if stored.get(name) != given[name]]
    if different:
        pairs = "; ".join(f"{name} {stored.get(name)!r:.80}, given {given[name]!r:.80}" for name in different)
        raise IncompatibleError(
            f"{where}: its vectors were made by encoder {stored.get('id')!r:.120}, which is not {encoder.id!r:.120}: "
            f"{pairs}. Scores across encoders or prompts mean nothing; load that encoder, or fit again with this one"
        )


def method_name(method: Embedding) -> str:
    """Return the name under which the class of ``method`` is registered.

    Raises:
        ComposeError: It is not.
    """
    for name in ADAPTER_EMBEDDINGS:
        if ADAPTER_EMBEDDINGS[name] is type(method):
            return name
    raise ComposeError(f"{type(method).__name__} is not registered in ADAPTER_EMBEDDINGS, so it cannot be saved")


def _fitted(folder: Path, facts: Mapping[str, Any], dim: int) -> AdapterVectors:
    from compose.files.safetensors_file import load as read_tensors

    arrays = {name: tensor.numpy() for name, tensor in read_tensors(folder / VECTORS_FILE).tensors.items()}
    total = sum(facts["counts"])
    wanted = {"vectors": (total, dim), "bias": (total,)}
    if any(name.startswith("moments_") for name in arrays):
        wanted |= {"moments_precision": (dim, dim), "moments_centre": (dim,), "moments_background": (dim, dim)}
    found = {name: array.shape for name, array in arrays.items()}
    if found != wanted or any(array.dtype != np.float32 for array in arrays.values()):
        raise AdapterFormatError(f"{folder / VECTORS_FILE}: holds {found}, wanted float32 {wanted}")
    moments = None
    if "moments_centre" in arrays:
        moments = Moments(**{part.name: arrays[f"moments_{part.name}"] for part in fields(Moments)})
    owners = np.repeat(np.arange(len(facts["counts"])), facts["counts"])
    return AdapterVectors(arrays["vectors"], owners, arrays["bias"], bool(facts["unit_queries"]), moments)
