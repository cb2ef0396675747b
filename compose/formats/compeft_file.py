"""ComPEFT's weight file: the tensors of a PEFT weight file, ternary ones coded, in a safetensors container.

The container holds one tensor, ``stream`` (U8), and in its metadata ``compeft``: the version, 1, and a count of bytes.
The stream begins with so many bytes of table, JSON behind zlib, since names are long and alike:
``{name: [dtype, shape, count, shift, magnitude, bytes]}`` for a coded tensor (see `compose.formats.compeft_codec`) and
``name: [dtype, shape]`` for one kept as it is, little endian. Their bytes follow in the table's order, nothing between
and nothing after. Values come back bit for bit.

Files come from strangers: the table is checked before anything is allocated, the bytes are read once, hashed, and
decoded from memory, and a file may not announce more than `MAX_EXPANSION` times its own size.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch

from compose.errors import AdapterFormatError
from compose.files import safetensors_file as files
from compose.files.strict_json import parse_object
from compose.formats.compeft_codec import MAX_SHIFT, Ternary, decode, encode, is_magnitude

MAX_EXPANSION = 8192
"""Bytes of tensors a byte of the file may stand for; tensors of one entry in 1000 and float64 stay below."""

SMALL_BYTES = 16 * 1024**2
"""Tensors of so many bytes together are allowed whatever the file's size: a file of zeros is tiny."""

TABLE_EXPANSION = 100
"""Bytes of table a byte of the file may stand for; equal names but for a number come to about 40."""

VERSION = "1"
_NAMES = {dtype: name for name, dtype in files.DTYPES.items()}
_CHANGED = "the file changed after it was inspected; open the bank again"


class Stored(NamedTuple):
    """One tensor of a file, from the table.

    Attributes:
        shape: Of the tensor.
        dtype: Of the tensor.
        code: Its code without the payload; None for a tensor kept as it is.
        start: First byte in the file.
        stop: Byte after its last.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    code: Ternary | None
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)


class CompeftHeader(NamedTuple):
    """A checked header.

    Attributes:
        stored: Name -> `Stored`, in file order.
        plain: The same as the header of the safetensors file that holds the decoded tensors, but with size and
            fingerprint of the coded file.
    """

    stored: Mapping[str, Stored]
    plain: files.FileHeader


def to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the file of these tensors; a tensor is coded where it is ternary and that is shorter.

    Raises:
        AdapterFormatError: It would announce more than `MAX_EXPANSION` times its size.
    """
    table: dict[str, list[Any]] = {}
    parts = []
    for name, tensor in tensors.items():
        entry: list[Any] = [_NAMES[tensor.dtype], list(tensor.shape)]
        code = encode(tensor)
        if code is not None and len(code.payload) < tensor.nbytes:
            entry += [code.entries, code.shift, code.magnitude, len(code.payload)]
            parts.append(code.payload)
        else:
            parts.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        table[name] = entry
    packed = zlib.compress(json.dumps(table, separators=(",", ":"), allow_nan=False).encode(), 9)
    stream = np.frombuffer(b"".join([packed, *parts]), np.uint8)
    data = safetensors.numpy.save({"stream": stream}, metadata={"compeft": f"{VERSION} {len(packed)}"})
    _parse_whole(data)
    return data


def read_header(path: Path, *, max_bytes: int = files.MAX_FILE_BYTES) -> CompeftHeader:
    """Check and parse the header of ``path``; no byte of the stream is read.

    Raises:
        AdapterFormatError: Anything wrong with it; the message names the file.
    """
    with io.BufferedReader(files.open_regular(path)) as stream:  # type: ignore[type-var]
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise AdapterFormatError(f"{path}: {size:,} bytes, more than the limit of {max_bytes:,}")
        head = stream.read(8)
        files.refuse_pointer(head + stream.read(200) if head.startswith(b"version ") else head, path)
        try:
            head += stream.read(_length(head, size))
            return _parse(head, stream.read(_table_length(head, size)), size)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"{path}: {error}") from error


def load(path: Path, *, fingerprint: str, max_bytes: int = files.MAX_FILE_BYTES) -> files.FileContent:
    """Read ``path`` once and return the decoded tensors and the hash of the file's bytes.

    Raises:
        AdapterFormatError: Anything wrong with it, also a header other than the one with ``fingerprint``.
    """
    data = files.read_bytes(path, max_bytes=max_bytes)
    try:
        header = _checked(data, fingerprint)
        view = np.frombuffer(data, np.uint8)
        tensors = {name: _tensor(name, stored, view) for name, stored in header.stored.items()}
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{path}: {error}") from error
    files.check_finite({name: tensors[name] for name, one in header.stored.items() if one.code is None}, path)
    return files.FileContent(tensors, hashlib.sha256(data).hexdigest(), moderate=False)


def file_sha256(path: Path, *, fingerprint: str, max_bytes: int = files.MAX_FILE_BYTES) -> str:
    """Return the hash of the file's bytes, refusing a file whose header does not have ``fingerprint``.

    Raises:
        AdapterFormatError: Missing, damaged or changed.
    """
    data = files.read_bytes(path, max_bytes=max_bytes)
    try:
        _checked(data, fingerprint)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{path}: {error}") from error
    return hashlib.sha256(data).hexdigest()


def _checked(data: bytes, fingerprint: str) -> CompeftHeader:
    header = _parse_whole(data)
    if header.plain.fingerprint != fingerprint:
        raise AdapterFormatError(_CHANGED)
    return header


def _parse_whole(data: bytes) -> CompeftHeader:
    head = data[: 8 + _length(data[:8], len(data))]
    return _parse(head, data[len(head) : len(head) + _table_length(head, len(data))], len(data))


def _tensor(name: str, stored: Stored, data: np.ndarray) -> torch.Tensor:
    payload = data[stored.start : stored.stop]
    if stored.code is None:
        return torch.from_numpy(payload.copy()).view(stored.dtype).reshape(stored.shape)
    try:
        return decode(stored.code, stored.shape, stored.dtype, payload)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"tensor {name!r}: {error}") from error


def _length(head: bytes, size: int) -> int:
    if len(head) < 8:
        raise AdapterFormatError(f"{size} bytes are too few for a ComPEFT file; it is empty or truncated")
    (length,) = struct.unpack("<Q", head)
    if length > files.MAX_HEADER_BYTES:
        raise AdapterFormatError(f"header of {length:,} bytes, more than {files.MAX_HEADER_BYTES:,}; no ComPEFT file?")
    if 8 + length > size:
        raise AdapterFormatError(f"header of {length:,} bytes in a file of {size:,}; the file is truncated")
    return int(length)


def _table_length(head: bytes, size: int) -> int:
    """Check the container and return how many bytes of table follow its header."""
    fields = parse_object(head[8:], "header")
    count = size - len(head)
    metadata = fields.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.keys() != {"compeft"} or not isinstance(metadata["compeft"], str):
        raise AdapterFormatError("the header does not tell of a table; not a ComPEFT file")
    version, _, length = metadata["compeft"].partition(" ")
    if version != VERSION:
        raise AdapterFormatError(f"version {version!r:.40} of the format is not known here; update compose")
    wanted = {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}
    if fields.keys() != {"__metadata__", "stream"} or fields["stream"] != wanted:
        raise AdapterFormatError(
            f"the header must describe one tensor 'stream' of the {count:,} bytes that follow; the file is truncated, "
            "has bytes appended, or is damaged"
        )
    if not re.fullmatch(r"[0-9]{1,10}", length) or int(length) > count:
        raise AdapterFormatError(f"a table of {length!r:.40} bytes does not fit a stream of {count:,}")
    return int(length)


def _parse(head: bytes, packed: bytes, size: int) -> CompeftHeader:
    """Check everything that can be checked without the tensors' bytes."""
    entries = parse_object(_unpacked(packed), "table")
    if not 0 < len(entries) <= files.MAX_TENSORS:
        raise AdapterFormatError(f"{len(entries):,} tensors; allowed are 1 to {files.MAX_TENSORS:,}")
    start = len(head) + len(packed)
    stored = _entries(entries, start)
    _check_sizes(stored, start, size)
    specs = {name: files.TensorSpec(one.shape, one.dtype) for name, one in stored.items()}
    fingerprint = hashlib.sha256(head + packed + struct.pack("<Q", size)).hexdigest()
    return CompeftHeader(stored, files.FileHeader(MappingProxyType(specs), size, fingerprint))


def _unpacked(packed: bytes) -> bytes:
    machine = zlib.decompressobj()
    limit = min(files.MAX_HEADER_BYTES, TABLE_EXPANSION * len(packed))
    try:
        text = machine.decompress(packed, max(1, limit))
    except zlib.error as error:
        raise AdapterFormatError(f"the table is damaged: {error}") from error
    if not machine.eof or machine.unused_data:
        raise AdapterFormatError(f"the table is damaged, or more than {limit:,} bytes")
    return text


def _entries(entries: Mapping[str, Any], start: int) -> dict[str, Stored]:
    files.check_tensor_names(entries)
    stored = {}
    for name, entry in entries.items():
        try:
            stored[name] = _entry(entry, start)
        except AdapterFormatError as error:
            raise AdapterFormatError(f"tensor {name!r}: {error}") from error
        start = stored[name].stop
    return stored


def _entry(entry: Any, start: int) -> Stored:
    if type(entry) is not list or len(entry) not in (2, 6) or entry[0] not in list(files.DTYPES):
        raise AdapterFormatError(f"its entry must be [dtype, shape] or six values, got {entry!r:.120}")
    shape, dtype = entry[1], files.DTYPES[entry[0]]
    if type(shape) is not list or not 1 <= len(shape) <= files.MAX_DIMS or not all(_natural(n, 1) for n in shape):
        raise AdapterFormatError(
            f"shape {shape!r:.120}; allowed are 1 to {files.MAX_DIMS} dimensions, none empty or above 2**31"
        )
    size = math.prod(shape)
    if len(entry) == 2:
        return Stored(tuple(shape), dtype, None, start, start + size * dtype.itemsize)
    count, shift, magnitude, num_bytes = entry[2:]
    if not (_natural(count, 0, size) and _natural(shift, 0, MAX_SHIFT) and _natural(num_bytes, 0)):
        raise AdapterFormatError(f"count, shift and bytes {count!r:.40}, {shift!r:.40}, {num_bytes!r:.40} are no code")
    if type(magnitude) is not int or (magnitude != 0 if count == 0 else not is_magnitude(magnitude, dtype)):
        raise AdapterFormatError(f"{magnitude!r:.40} is no magnitude of {count:,} entries of dtype {entry[0]}")
    return Stored(tuple(shape), dtype, Ternary(count, shift, magnitude, b""), start, start + num_bytes)


def _check_sizes(stored: Mapping[str, Stored], start: int, size: int) -> None:
    end = max(one.stop for one in stored.values())
    if end != size:
        raise AdapterFormatError(f"the table describes {end - start:,} bytes, the stream holds {size - start:,}")
    decoded = sum(one.size * one.dtype.itemsize for one in stored.values())
    if decoded > min(files.MAX_FILE_BYTES, max(SMALL_BYTES, MAX_EXPANSION * size)):
        raise AdapterFormatError(
            f"{size:,} bytes announce {decoded:,} bytes of tensors; allowed are {MAX_EXPANSION:,} times the file's "
            f"size, or {SMALL_BYTES:,}, and never more than {files.MAX_FILE_BYTES:,}"
        )


def _natural(value: Any, low: int, high: int = 2**31) -> bool:
    return type(value) is int and low <= value <= high
