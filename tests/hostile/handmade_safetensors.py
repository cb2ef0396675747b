"""34 weight files: 20 that safetensors refuses, 13 hostile ones that it accepts, and one that is hostile in use."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compose.bank import Bank
from tests.hostile.adapters import (
    CONFIG_NAME,
    IN,
    RANK,
    SCALING,
    TARGETS,
    WEIGHTS_NAME,
    files_of,
    lora_tensors,
    parts_of,
    raw,
    weights_of,
    write,
)
from tests.hostile.handmade import Case

GOOD = files_of(lora_tensors())
A_NAME = f"base_model.model.{TARGETS[0]}.lora_A.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 83900000\n"


def _weights(name: str, data: bytes | Callable[[], bytes], reason: str) -> Case:
    """A case of a sound configuration beside this weight file."""

    def make(folder: Path) -> Path:
        content = data if isinstance(data, bytes) else data()
        return write(folder, {CONFIG_NAME: GOOD[CONFIG_NAME], WEIGHTS_NAME: content})

    return Case(name, make, reason, check=None if reason else same_values)


def same_values(bank: Bank) -> None:
    """What was loaded is what was saved."""
    (name,) = bank.names
    for path in TARGETS:
        update = bank[name].targets[path]
        torch.testing.assert_close(update.a, lora_tensors()[f"base_model.model.{path}.lora_A.weight"], rtol=0, atol=0)
        torch.testing.assert_close(update.b, lora_tensors()[f"base_model.model.{path}.lora_B.weight"], rtol=0, atol=0)
        assert update.scaling == SCALING


def _entry(name: str = A_NAME, **changed: Any) -> bytes:
    """The sound file with one entry of its header changed."""
    header, data = parts_of(GOOD[WEIGHTS_NAME])
    header[name] = {**header[name], **changed}
    return raw(header, data)


def _moved(shift: int) -> bytes:
    """The sound file with everything but the first tensor moved: an overlap, or a hole."""
    header, data = parts_of(GOOD[WEIGHTS_NAME])
    for name, entry in header.items():
        if name != "__metadata__" and entry["data_offsets"][0]:
            entry["data_offsets"] = [at + shift for at in entry["data_offsets"]]
    return raw(header, data[: len(data) + shift] if shift < 0 else data + bytes(shift))


def _renamed(name: str) -> bytes:
    header, data = parts_of(GOOD[WEIGHTS_NAME])
    header[name] = header.pop(A_NAME)
    return raw(header, data)


def _values(value: float, dtype: torch.dtype = torch.float32) -> bytes:
    tensors = lora_tensors(dtype)
    tensors[A_NAME][0, 0] = value
    return weights_of(tensors)


def _text(change: Callable[[bytes], bytes]) -> bytes:
    """The sound file with its header's text changed."""
    header, data = parts_of(GOOD[WEIGHTS_NAME])
    return raw(change(json.dumps(header).encode()), data)


def _metadata(value: Any) -> bytes:
    header, data = parts_of(GOOD[WEIGHTS_NAME])
    return raw({**header, "__metadata__": value}, data)


def _many_tensors() -> bytes:
    """100,000 tensors: pairs of 4 bytes per factor, in order."""
    names = [f"base_model.model.m.layers.{at}.q.lora_{half}.weight" for at in range(50_000) for half in "AB"]
    header = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * at, 4 * at + 4]} for at, name in enumerate(names)
    }
    return raw(header, bytes(4 * len(names)))


def _float8() -> bytes:
    header, data = parts_of(GOOD[WEIGHTS_NAME])
    header[A_NAME].update(dtype="F8_E4M3", shape=[4 * RANK, IN])
    return raw(header, data)


def _float4() -> bytes:
    header, data = parts_of(GOOD[WEIGHTS_NAME])
    header[A_NAME].update(dtype="F4", shape=[8 * RANK, IN])
    return raw(header, data)


def _overflowing() -> bytes:
    return weights_of({name: tensor * 1e30 for name, tensor in lora_tensors().items()})


SAFETENSORS = [
    _weights("empty file", b"", "too few"),
    _weights("three bytes", b"\1\0\0", "too few"),
    _weights("Git LFS pointer", LFS, r"83\.9 MB not downloaded.*git lfs pull"),
    _weights("header longer than the file", lambda: raw({"a": 1}, length=10_000), "truncated"),
    _weights("header of 100 MB", lambda: raw(b"{" + b" " * 100_000_000 + b"}"), "more than the limit"),
    _weights("header of 2^63 bytes", struct.pack("<Q", 2**63) + b"{}", "more than the limit"),
    _weights("header is no JSON", lambda: _text(lambda text: text[:-3]), "not valid JSON"),
    _weights("header is no UTF-8", lambda: _text(lambda text: text.replace(b"lora", b"l\xffra", 1)), "not UTF-8"),
    _weights("overlapping tensors", lambda: _moved(-4), "hole or overlap"),
    _weights("a hole between tensors", lambda: _moved(4), "hole or overlap"),
    _weights("bytes appended", lambda: GOOD[WEIGHTS_NAME] + b"x", "bytes appended"),
    _weights("bytes missing", lambda: GOOD[WEIGHTS_NAME][:-1], "truncated"),
    _weights("negative offset", lambda: _entry(data_offsets=[-48, 0]), "does not fit offsets"),
    _weights("end before begin", lambda: _entry(data_offsets=[48, 0]), "does not fit offsets"),
    _weights("shape that does not fit", lambda: _entry(shape=[3, IN]), "does not fit offsets"),
    _weights("shape that overflows 64 bits", lambda: _entry(shape=[2**40, 2**40]), "does not fit offsets"),
    _weights("unknown dtype", lambda: _entry(dtype="F31"), "dtype 'F31'; supported are"),
    _weights("metadata that are not strings", lambda: _metadata({"format": 1}), "__metadata__"),
    _weights("header nested 100,000 times", lambda: raw(b'{"a":' * 100_000), "nested|not valid JSON"),
    _weights("a list instead of an object", lambda: raw(b'["a"]'), "start with"),
    _weights("shape (0, 2^62)", lambda: raw({"a": _spec([0, 2**62], 0, 0)}), "none empty"),
    _weights("4096 dimensions", lambda: _entry(shape=[1] * 4095 + [RANK * IN]), "1 to 8 dimensions"),
    _weights("a tensor twice", lambda: _text(_twice), "duplicate key"),
    _weights("5 MB of metadata", lambda: _metadata({"format": "pt", "x": "x" * 5_000_000}), ""),
    _weights("no tensors", lambda: raw({"__metadata__": {"format": "pt"}}), "0 tensors"),
    _weights("NUL in a name", lambda: _renamed(A_NAME + "\0"), "is not allowed"),
    _weights("a path as a name", lambda: _renamed("../../etc/passwd"), "is not allowed"),
    _weights("NaN", lambda: _values(float("nan")), "not finite .* in .*lora_A"),
    _weights("infinity", lambda: _values(float("-inf"), torch.bfloat16), "not finite .* in .*lora_A"),
    _weights("100,000 tensors", _many_tensors, "tensors"),
    _weights("float8", _float8, "dtype 'F8_E4M3'; supported are"),
    _weights("float4", _float4, "dtype 'F4'; supported are"),
    _weights("spaces around the header", lambda: _text(lambda text: b"  " + text + b"  "), "start with"),
    _weights("an update that overflows float32", _overflowing, "float32"),
]


def _spec(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def _twice(text: bytes) -> bytes:
    header = json.loads(text)
    return text[:-1] + b"," + json.dumps({A_NAME: header[A_NAME]}).encode()[1:]
