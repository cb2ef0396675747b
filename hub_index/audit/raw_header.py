"""A safetensors header as it stands, wrong or not: what a strict reader refuses at its first fault, listed in full.

No weight byte is read, and nothing is allocated that the file does not already hold.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from compose.errors import AdapterFormatError
from compose.files.safetensors_file import MAX_HEADER_BYTES, open_regular, refuse_bomb
from compose.files.strict_json import is_shallow


class RawTensor(NamedTuple):
    """One entry of the header whose three fields have the right types, whatever their values.

    Attributes:
        name: As written.
        dtype: As written (``"F16"``).
        shape: Numbers of 0 or more.
        begin: Offset of its first byte in the data section.
        end: Offset after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class RawHeader(NamedTuple):
    """What stands at the beginning of a weight file.

    Attributes:
        size: Bytes of the file.
        head: Its first bytes, at most 200.
        length: The header's length as declared; None where the file is too short to declare one.
        problem: Why the header's text cannot be used, ``""`` when it can.
        twice: Keys that stand twice in one object.
        malformed: Entries without a dtype, shape and offsets of the right types, each with its text.
        metadata_bytes: Size of ``__metadata__``.
        metadata_text: Whether ``__metadata__`` maps texts to texts.
        tensors: All other entries, in file order; of two with one name the last.
    """

    size: int
    head: bytes
    length: int | None = None
    problem: str = ""
    twice: tuple[str, ...] = ()
    malformed: tuple[str, ...] = ()
    metadata_bytes: int = 0
    metadata_text: bool = True
    tensors: tuple[RawTensor, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the declared header lies inside the file and is not larger than any real one."""
        return self.length is not None and self.length <= MAX_HEADER_BYTES and 8 + self.length <= self.size


def read_raw_header(path: Path) -> RawHeader:
    """Read what can be read of the header of ``path``.

    Raises:
        AdapterFormatError: It cannot be opened, or is not a regular file.
    """
    with open_regular(path) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        head = _read(stream, 200)
        if len(head) < 8:
            return RawHeader(size, head)
        (length,) = struct.unpack("<Q", head[:8])
        found = RawHeader(size, head, length)
        if not found.whole:
            return found
        stream.seek(8)
        text = _read(stream, length)
    return _parse(found, text)


def _parse(found: RawHeader, text: bytes) -> RawHeader:
    try:
        entries, twice = _entries(text)
    except AdapterFormatError as error:
        return found._replace(problem=str(error))
    if not isinstance(entries, dict):
        return found._replace(problem=f"a JSON {type(entries).__name__}, not an object")
    metadata = entries.pop("__metadata__", {})
    tensors, malformed = [], []
    for name, entry in entries.items():
        tensor = _tensor(name, entry)
        if tensor is None:
            malformed.append(f"{name[:200]!r}: {entry!r:.120}")
        else:
            tensors.append(tensor)
    return found._replace(
        twice=tuple(twice),
        malformed=tuple(malformed),
        metadata_bytes=len(json.dumps(metadata)),
        metadata_text=isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
        tensors=tuple(tensors),
    )


def _entries(text: bytes) -> tuple[Any, list[str]]:
    """Return the JSON of a header, and the keys that stand twice in one object.

    Raises:
        AdapterFormatError: There is none, or it is a bomb.
    """
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice.extend(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return result

    refuse_bomb(text)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=collect)
    except UnicodeDecodeError as error:
        raise AdapterFormatError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise AdapterFormatError("nested too deeply") from error
    except ValueError as error:
        raise AdapterFormatError(f"not JSON: {error}") from error
    if not is_shallow(entries):
        raise AdapterFormatError("nested too deeply")
    return entries, twice


def _tensor(name: str, entry: Any) -> RawTensor | None:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return None
    return RawTensor(name, dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return type(value) is list and all(type(item) is int and item >= 0 for item in value)


def read_tensor_bytes(path: Path, header: RawHeader, tensor: RawTensor) -> bytes:
    """Read the bytes of one tensor of a file whose header was read before.

    Raises:
        AdapterFormatError: The file ends before them.
    """
    if header.length is None:
        raise AdapterFormatError(f"{path}: has no header")
    with open_regular(path) as stream:
        stream.seek(8 + header.length + tensor.begin)
        data = _read(stream, tensor.end - tensor.begin)
    if len(data) != tensor.end - tensor.begin:
        raise AdapterFormatError(f"{path}: ends inside tensor {tensor.name[:200]!r}")
    return data


def _read(stream: BinaryIO, count: int) -> bytes:
    """Read ``count`` bytes, fewer only at the end of the file."""
    pieces: list[bytes] = []
    while count > 0 and (piece := stream.read(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
