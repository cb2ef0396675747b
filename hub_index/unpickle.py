"""Pickled weights (``adapter_model.bin``) as safetensors, only where someone asked for it.

A pickle is a program. torch's restricted unpickler (``weights_only=True``) runs none of it, but had holes before 2.10
(CVE-2025-32434, CVE-2026-24747), so: torch 2.10 or newer; in a process of its own that is given the bytes and returns
bytes, with bounds on memory, time and what it may write; and nothing but plain tensors that lie whole in their storage
is taken.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from compose.errors import BackendUnavailableError, DuplicateNameError
from compose.files import safetensors_file as files
from compose.files.publish import publish_folder
from compose.formats.peft_folder import CONFIG_NAME, LEGACY_NAME, WEIGHTS_NAME, read_config
from compose.hub_index.refusals import AdapterRejectedError
from compose.hub_index.sources import check_link

TORCH_FLOOR = (2, 10)
SECONDS = 120
_MARGIN = 2**30
_WORKER = "compose.hub_index.unpickle_worker"


class Converted(NamedTuple):
    """A folder that was made of pickled weights.

    Attributes:
        folder: Holds the configuration verbatim, and the weights as safetensors.
        sha256_pickle: Of the pickled file.
    """

    folder: Path
    sha256_pickle: str


def convert_pickled(folder: Path, root: Path, into: Path, *, max_bytes: int = files.MAX_FILE_BYTES) -> Converted:
    """Write the pickled adapter in ``folder`` as a folder below ``into``, whole or not at all, and return it.

    It is named by the hash of both files; if it is there already, it is left as it is.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.bin``.
        root: Real path below which links may lead.
        into: Folder of converted adapters.
        max_bytes: Larger files are refused, and so is what becomes larger.

    Raises:
        AdapterRejectedError: Not only plain tensors, damaged, too large, or it took too long; nothing is written.
        AdapterFormatError: One of the files cannot be read.
        BackendUnavailableError: torch is older than 2.10, or the system cannot bound a process.
    """
    _check_torch()
    path = folder / LEGACY_NAME
    check_link(path, root)
    check_link(folder / CONFIG_NAME, root)
    config = read_config(folder).text.encode()
    data = files.read_bytes(path, max_bytes=max_bytes)
    files.refuse_pointer(data[:200], path)
    sha256 = hashlib.sha256(data).hexdigest()
    target = into / hashlib.sha256(f"{sha256}\n{hashlib.sha256(config).hexdigest()}".encode()).hexdigest()
    if not target.is_dir():
        weights = _run_worker(path, data, max_bytes)
        files.parse_header(weights, path)
        with suppress(DuplicateNameError):  # another process made it meanwhile, out of the same bytes
            publish_folder({CONFIG_NAME: config, WEIGHTS_NAME: weights}, target)
    return Converted(target, sha256)


def _check_torch() -> None:
    import torch

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_FLOOR:
        raise BackendUnavailableError(
            f"pickled weights need torch 2.10 or newer (CVE-2025-32434, CVE-2026-24747), this is {torch.__version__}. "
            "Run: pip install -U torch; or save the adapter as safetensors elsewhere"
        )
    if os.name != "posix":
        raise BackendUnavailableError(
            "pickled weights are read in a process with bounds on memory and time, which this system does not have; "
            "save the adapter as safetensors elsewhere"
        )


def _run_worker(path: Path, data: bytes, max_bytes: int) -> bytes:
    """Return the safetensors bytes the worker makes of ``data``."""
    bounds = [str(max_bytes), str(5 * len(data) + _MARGIN), str(SECONDS)]
    kept = {
        key: value for key, value in os.environ.items() if key in ("HOME", "PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-B", "-m", _WORKER, *bounds],
            input=data,
            capture_output=True,
            timeout=2 * SECONDS,
            env={**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"{path}: reading it took more than {2 * SECONDS} s; save the adapter as safetensors elsewhere"
        raise AdapterRejectedError("pickle", message) from None
    if done.returncode == 0:
        return done.stdout
    reason = done.stderr.decode("utf-8", "replace").strip().splitlines()
    said = reason[-1][:500] if done.returncode == 3 and reason else f"the process ended with {done.returncode}"
    raise AdapterRejectedError("pickle", f"{path}: {said}; save the adapter as safetensors where you trust it")
