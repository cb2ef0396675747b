"""Safetensors files from strangers: header checked before anything is allocated, bytes read once, hashed, then parsed.

Never memory-mapped: a mapped file that someone truncates kills the process, and one that someone overwrites changes
the loaded values after they were hashed.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch

from compose.errors import AdapterFormatError
from compose.files.strict_json import parse_object

MAX_FILE_BYTES = 2 * 1024**3
MAX_HEADER_BYTES = 16 * 1024**2
MAX_TENSORS = 90_000
"""LoRA on every expert of DeepSeek-V3 (58 layers of 256 experts with 3 projections) and its attention is 89,698."""

MAX_DIMS = 8
MAX_NAME = 512
MAX_SEGMENTS = 64
"""Parts of a name between dots."""

MODERATE = 2.0**48
"""Factors below it, of any rank and scaling that is allowed, give an update that float32 holds."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EXPONENTS = {  # dtype -> words in numpy, bits of the mantissa, bits of the exponent
    torch.float64: ("<u8", 52, 11),
    torch.float32: ("<u4", 23, 8),
    torch.float16: ("<u2", 10, 5),
    torch.bfloat16: ("<u2", 7, 8),
}
_LFS = b"version https://git-lfs.github.com/spec/"
_CHANGED = "the file changed after it was inspected; open the bank again"
_AGAIN = "save or download it again"
_CACHED_BYTES = 2**20
_CHUNK_WORDS = 2**16  # in the cache
_BAD_NAME = re.compile(r"[^\x21-\x7e\n]|\.\.|[/\\]|^\.|\.$|^$", re.MULTILINE)


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor, from the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class FileHeader:
    """A checked safetensors header. Files with equal header bytes and size share one.

    Attributes:
        tensors: Name -> `TensorSpec` in file order.
        num_bytes: Size of the whole file.
        fingerprint: Hash of the header bytes together with the file size.
        metadata: The header's ``__metadata__``.
    """

    tensors: Mapping[str, TensorSpec]
    num_bytes: int
    fingerprint: str
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class FileContent(NamedTuple):
    """The tensors of a safetensors file, on the CPU.

    Attributes:
        tensors: Name -> tensor.
        sha256: Of exactly the bytes they were parsed from.
        moderate: Whether every value is known to be smaller than `MODERATE`.
    """

    tensors: dict[str, torch.Tensor]
    sha256: str
    moderate: bool


def read_header(path: Path, *, max_bytes: int = MAX_FILE_BYTES, empty: bool = False) -> FileHeader:
    """Check and parse the header of ``path``; no weight byte is read.

    Args:
        path: The file.
        max_bytes: Larger files are refused.
        empty: Allow tensors without entries (AdaLoRA prunes ranks to 0); anywhere else they are ungathered shards.

    Raises:
        AdapterFormatError: Anything wrong with the file; the message names file, tensor and reason.
    """
    with open_regular(path) as stream:
        size = _bounded_size(stream, path, max_bytes)
        head = _read_up_to(stream, 8)
        refuse_pointer(head + _read_up_to(stream, 200) if head.startswith(b"version ") else head, path)
        length = _header_length(head, size, path)
        return _parse_at(path, head + _read_up_to(stream, length), size, empty)


def load(path: Path, *, fingerprint: str | None = None, max_bytes: int = MAX_FILE_BYTES) -> FileContent:
    """Read ``path`` once and return its tensors, none of them sharing memory with the file.

    Args:
        path: The file.
        fingerprint: Of a header read earlier; a file whose header differs is refused.
        max_bytes: Files larger than this are refused before they are read.

    Raises:
        AdapterFormatError: Anything wrong with the file, also a value that is not finite.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    refuse_pointer(data[:200], path)
    start = 8 + _header_length(data[:8], len(data), path)
    if fingerprint is None:
        _parse_at(path, data[:start], len(data))
    elif _fingerprint(data[:start], len(data)) != fingerprint:
        raise AdapterFormatError(f"{path}: {_CHANGED}")
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise AdapterFormatError(f"{path}: not a valid safetensors file: {error}") from error
    dtypes = {tensor.dtype for tensor in tensors.values()}
    bound = _bound(data, start, dtypes.pop()) if len(dtypes) == 1 else math.inf
    if not math.isfinite(bound):
        check_finite(tensors, path)
    return FileContent(tensors, hashlib.sha256(data).hexdigest(), bound <= MODERATE)


def file_sha256(path: Path, *, fingerprint: str, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Return the hash of the file's bytes, refusing a file whose header does not have ``fingerprint``.

    Raises:
        AdapterFormatError: Missing, damaged or changed.
    """
    data = read_bytes(path, max_bytes=max_bytes)
    start = 8 + _header_length(data[:8], len(data), path)
    if _fingerprint(data[:start], len(data)) != fingerprint:
        raise AdapterFormatError(f"{path}: {_CHANGED}")
    return hashlib.sha256(data).hexdigest()


def parse_header(data: bytes, path: Path) -> FileHeader:
    """Check and parse the header of a whole file in memory; ``path`` is for messages.

    Raises:
        AdapterFormatError: Anything wrong with it.
    """
    refuse_pointer(data[:200], path)
    length = _header_length(data[:8], len(data), path)
    return _parse_at(path, data[: 8 + length], len(data))


def check_finite(tensors: Mapping[str, torch.Tensor], where: object) -> None:
    """Raise when a tensor holds NaN or an infinity.

    Raises:
        AdapterFormatError: Names every such tensor.
    """
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise AdapterFormatError(
            f"{where}: values that are not finite (NaN or infinity) in {shown}; the file is unusable, train or save "
            "the adapter again"
        )


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Read a regular file whole.

    Raises:
        AdapterFormatError: Missing, not a regular file, larger than ``max_bytes``, or changing while it is read.
    """
    with open_regular(path) as stream:
        size = _bounded_size(stream, path, max_bytes)
        data = _read_up_to(stream, size + 1)
    if len(data) != size:
        raise AdapterFormatError(
            f"{path}: the file changed size while it was read; try again when nobody writes to it"
        )
    return data


def open_regular(path: Path) -> BinaryIO:
    """Open ``path`` unbuffered for reading if it is, or links to, a regular file; a FIFO or device cannot block this.

    Raises:
        AdapterFormatError: Missing, unreadable or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise AdapterFormatError(f"{path}: cannot be opened: {reason}; give a folder whose files are there") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterFormatError(f"{path}: not a regular file; only files, and links to files, are read")
    return os.fdopen(descriptor, "rb", buffering=0)


def _bound(data: bytes, start: int, dtype: torch.dtype) -> float:
    """Return a power of 2 above all magnitudes of a file, infinity where a value is not finite.

    The exponents of all tensors at once, a chunk in the cache at a time: a check per tensor in torch takes 20 times as
    long.
    """
    code, mantissa, width = _EXPONENTS[dtype]
    words = np.frombuffer(memoryview(data)[start:], code)
    mask = words.dtype.type((2**width - 1) << mantissa)
    chunks = range(0, len(words), _CHUNK_WORDS)
    largest = max((int((words[at : at + _CHUNK_WORDS] & mask).max()) for at in chunks), default=0) >> mantissa
    if largest == 2**width - 1:
        return math.inf
    return math.ldexp(1.0, min(largest - 2 ** (width - 1) + 2, 1023))


def _fingerprint(head: bytes, size: int) -> str:
    return hashlib.sha256(head + struct.pack("<Q", size)).hexdigest()


def _bounded_size(stream: BinaryIO, path: Path, max_bytes: int) -> int:
    size = os.fstat(stream.fileno()).st_size
    if size > max_bytes:
        raise AdapterFormatError(f"{path}: {size:,} bytes, more than the limit of {max_bytes:,}")
    return size


def _read_up_to(stream: BinaryIO, count: int) -> bytes:
    """Read ``count`` bytes, fewer only at the end of the file."""
    data = stream.read(count)
    if len(data) == count:
        return data
    pieces = [data]
    missing = count - len(data)
    while missing > 0 and (piece := stream.read(missing)):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def refuse_pointer(data: bytes, path: Path) -> None:
    """Raise when ``data`` is the beginning of a Git LFS pointer.

    Raises:
        AdapterFormatError: It is; the message says how to get the file.
    """
    if not data.startswith(_LFS):
        return
    size = re.search(rb"\nsize (\d{1,18})\n?", data)
    amount = f" ({int(size[1]) / 1e6:,.1f} MB not downloaded)" if size else ""
    raise AdapterFormatError(f"{path}: a Git LFS pointer, not the weights{amount}. Run: git lfs pull")


def _header_length(head: bytes, size: int, path: Path) -> int:
    if len(head) < 8:
        raise AdapterFormatError(
            f"{path}: {size} bytes are too few for a safetensors file; it is empty or truncated, {_AGAIN}"
        )
    (length,) = struct.unpack("<Q", head)
    if length > MAX_HEADER_BYTES:
        raise AdapterFormatError(
            f"{path}: header of {length:,} bytes, more than the limit of {MAX_HEADER_BYTES:,}; not a safetensors file?"
        )
    if 8 + length > size:
        raise AdapterFormatError(
            f"{path}: header of {length:,} bytes in a file of {size:,}; the file is truncated, {_AGAIN}"
        )
    return int(length)


def _parse_at(path: Path, head: bytes, size: int, empty: bool = False) -> FileHeader:
    try:
        return (_parse_small_header if len(head) <= _CACHED_BYTES else _parse_header)(head, size, empty)
    except AdapterFormatError as error:
        raise AdapterFormatError(f"{path}: {error}") from error


@lru_cache(maxsize=16)  # the adapters of a bank mostly have equal headers
def _parse_small_header(head: bytes, size: int, empty: bool) -> FileHeader:
    return _parse_header(head, size, empty)


def _parse_header(head: bytes, size: int, empty: bool) -> FileHeader:
    """Check everything safetensors checks and what it does not, from ``head`` (length field and header) alone."""
    if head[8:9] != b"{":
        raise AdapterFormatError(f"the safetensors header does not start with '{{'; {_AGAIN}")
    refuse_bomb(head)
    entries = parse_object(head[8:], "header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError("header __metadata__ must map strings to strings")
    if not 0 < len(entries) <= MAX_TENSORS:
        raise AdapterFormatError(f"{len(entries):,} tensors; allowed are 1 to {MAX_TENSORS:,}")
    check_tensor_names(entries)
    tensors: dict[str, TensorSpec] = {}
    spans = []
    for name, entry in entries.items():
        tensors[name], begin, end = _parse_entry(name, entry, empty)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise AdapterFormatError(
                f"tensor {name!r} starts at byte {begin}, expected {position} (hole or overlap); {_AGAIN}"
            )
        position = end
    if position != size - len(head):
        raise AdapterFormatError(
            f"the header describes {position:,} bytes of tensors, the file holds {size - len(head):,}; "
            f"it is truncated or has bytes appended, {_AGAIN}"
        )
    return FileHeader(MappingProxyType(tensors), size, _fingerprint(head, size), MappingProxyType(metadata))


def check_tensor_names(names: Collection[str]) -> None:
    """Raise AdapterFormatError for names that are too long or hold control characters."""
    joined = "\n".join(names)  # one search for all names; a line feed inside a name shows in the count
    fine = joined.count("\n") == len(names) - 1 and max(map(len, names)) <= MAX_NAME and not _BAD_NAME.search(joined)
    if fine and max(name.count(".") for name in names) < MAX_SEGMENTS:
        return
    bad = next(
        name
        for name in names
        if len(name) > MAX_NAME or "\n" in name or _BAD_NAME.search(name) or name.count(".") >= MAX_SEGMENTS
    )
    raise AdapterFormatError(
        f"tensor name {bad[:120]!r} is not allowed; 1 to {MAX_NAME} printable ASCII characters without space, slash, "
        f"backslash and '..', not starting or ending with a dot, of at most {MAX_SEGMENTS} parts"
    )


def refuse_bomb(head: bytes) -> None:
    """Raise when the text of a header would take much more memory parsed: an empty list of two bytes becomes 64.

    Raises:
        AdapterFormatError: It would; the message counts.
    """
    if (tensors := head.count(b'"data_offsets"')) > MAX_TENSORS:
        raise AdapterFormatError(f"{tensors:,} tensors; allowed are 1 to {MAX_TENSORS:,}")
    lists = head.count(b"[") + head.count(b"{")
    if lists > 4 * MAX_TENSORS or head.count(b",") > 12 * MAX_TENSORS:
        raise AdapterFormatError(
            f"a header of {lists:,} lists and objects and {head.count(b','):,} commas is not that of an adapter; at "
            f"most {4 * MAX_TENSORS:,} and {12 * MAX_TENSORS:,} are allowed"
        )


def _parse_entry(name: str, entry: Any, empty: bool) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterFormatError(
            f"header entry of {name!r} must have dtype, shape and data_offsets, got {entry!r:.120}"
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise AdapterFormatError(
            f"tensor {name!r} has dtype {entry['dtype']!r:.40}; supported are {', '.join(DTYPES)}. Convert it first"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not 1 <= len(shape) <= MAX_DIMS or (0 in shape and not empty):
        raise AdapterFormatError(
            f"tensor {name!r} has shape {shape!r:.120}; allowed are 1 to {MAX_DIMS} dimensions, none empty "
            "(an empty tensor is a shard that was not gathered before saving)"
        )
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise AdapterFormatError(
            f"tensor {name!r} of shape {shape!r:.120} and dtype {entry['dtype']} does not fit offsets "
            f"{offsets!r:.120}; {_AGAIN}"
        )
    return TensorSpec(tuple(shape), dtype), offsets[0], offsets[1]


def _counts(value: Any) -> bool:
    if type(value) is not list:
        return False
    for item in value:  # noqa: SIM110 - a generator costs three times as much, and this runs per tensor
        if type(item) is not int or item < 0:
            return False
    return True
