"""The files of a PEFT folder, whatever its kind: where they are, and the configuration as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from compose.errors import AdapterFormatError
from compose.files import safetensors_file as files
from compose.files.paths import exists, is_link
from compose.files.strict_json import parse_object

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
LEGACY_NAME = "adapter_model.bin"
MAX_CONFIG_BYTES = 1024**2


class ConfigFile(NamedTuple):
    """``adapter_config.json``: its fields, its text verbatim, and where it lies."""

    fields: dict[str, Any]
    text: str
    path: Path


def read_config(folder: Path) -> ConfigFile:
    """Read ``adapter_config.json``.

    Raises:
        AdapterFormatError: Missing, too large, a Git LFS pointer, or no JSON object.
    """
    path = folder / CONFIG_NAME
    data = files.read_bytes(path, max_bytes=MAX_CONFIG_BYTES)
    files.refuse_pointer(data[:200], path)
    return ConfigFile(parse_object(data, path), data.decode(), path)


def weights_path(folder: Path) -> Path:
    """Return the path of the weight file.

    Raises:
        AdapterFormatError: There is only a pickled one.
    """
    path = folder / WEIGHTS_NAME
    if not exists(path) and not is_link(path) and exists(folder / LEGACY_NAME):
        raise AdapterFormatError(
            f"{folder / LEGACY_NAME}: pickled weights can run code and are not read. Convert them once, where you "
            "trust the file: load the adapter with peft and save_pretrained(..., safe_serialization=True)"
        )
    return path
