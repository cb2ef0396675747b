"""8 folders with pickled weights, or with something pickled under another name."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.hostile.adapters import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, files_of, lora_tensors, write
from tests.hostile.handmade import Case
from tests.hostile.handmade_safetensors import LFS, same_values

GOOD = files_of(lora_tensors())
CONFIG = {CONFIG_NAME: GOOD[CONFIG_NAME]}
MARK = "canary"
REFUSED = "pickled weights can run code"


class Gadget:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


def legacy_pickle(value: object) -> bytes:
    """Return a plain pickle, as torch before 1.6 wrote them."""
    return pickle.dumps(value, protocol=2)


def zip_pickle(value: object) -> bytes:
    """Return a file as torch writes it today, with ``value`` pickled inside."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def stride_zero() -> bytes:
    """A small file of one entry that describes 10^9 of them."""
    return zip_pickle({"base_model.model.m.layers.0.q.lora_A.weight": torch.zeros(1).expand(10**9)})


def deflate_bomb() -> bytes:
    """A small archive of 200 MB of zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    return stream.getvalue()


def _fifo(folder: Path) -> Path:
    write(folder, CONFIG)
    os.mkfifo(folder / PICKLE_NAME)
    return folder


def _only(data: bytes) -> dict[str, bytes]:
    return {**CONFIG, PICKLE_NAME: data}


def _as_weights(data: bytes) -> dict[str, bytes]:
    return {**CONFIG, WEIGHTS_NAME: data}


def _command() -> Gadget:
    return Gadget(os.system, f"echo the pickle ran > {MARK}")


PICKLES = [
    Case("a pickle that runs a command", lambda folder: write(folder, _only(legacy_pickle(_command()))), REFUSED),
    Case("torch's archive around it", lambda folder: write(folder, _only(zip_pickle({"a": _command()}))), REFUSED),
    Case("10^9 entries of stride 0", lambda folder: write(folder, _only(stride_zero())), REFUSED),
    Case("a FIFO", _fifo, REFUSED),
    Case(
        "beside sound safetensors",
        lambda folder: write(folder, {**GOOD, PICKLE_NAME: legacy_pickle(_command())}),
        "",
        check=same_values,
    ),
    Case(
        "a pickle called safetensors",
        lambda folder: write(folder, _as_weights(legacy_pickle(_command()))),
        "limit|truncated",
    ),
    Case(
        "an archive of 200 MB of zeros called safetensors",
        lambda folder: write(folder, _as_weights(deflate_bomb())),
        "limit|truncated",
    ),
    Case("a Git LFS pointer", lambda folder: write(folder, _only(LFS)), "git lfs pull|" + REFUSED),
]
