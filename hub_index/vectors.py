"""Exact cosine search over one float32 matrix per (encoder, kind, base), kept as ``.npy`` beside the index.

The rows of the tables are the truth; a file is only a copy that is faster to read. Its name says which rows it was
made from: SHA-256 over the encoder, the base, the rows' numbers and a hash of each vector. When that differs, the file
is not looked at and a new one is made. Exact search answers from 10^5 vectors of 384 entries in about 25 ms of CPU
(spec/ecosystem.md 1.3), so no approximate index is needed here.

Shape letters: ``N`` adapters, ``D`` entries of a vector.
"""

from __future__ import annotations

import hashlib
import io
import logging
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from compose.errors import HubIndexError
from compose.hub_index import rows
from compose.hub_index.durable import publish_file
from compose.hub_index.records import EmbeddingRecord

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_BLOCK = 16_384


class Matrix(NamedTuple):
    """Unit vectors of adapters.

    Attributes:
        rows: ``(N,)`` row of each adapter in the index, ascending.
        unit: ``(N, D)`` float32, every row of length 1.
    """

    rows: np.ndarray
    unit: np.ndarray


class Encoder(NamedTuple):
    """One encoder and kind of vector that an index knows, by its row."""

    row: int
    encoder_id: str
    kind: str
    sha256: str
    prompt: str
    dim: int


def encoders(connection: sqlite3.Connection) -> list[Encoder]:
    """Return all encoders of the index."""
    query = "SELECT id, encoder_id, kind, sha256, prompt, dim FROM encoder ORDER BY encoder_id, kind"
    return [Encoder(*one) for one in connection.execute(query)]


def encoder_of(connection: sqlite3.Connection, query: EmbeddingRecord) -> Encoder:
    """Return the encoder that ``query`` was made with.

    Raises:
        HubIndexError: The index has no vectors of that name and kind, or they were made otherwise.
    """
    known = encoders(connection)
    for one in known:
        if (one.encoder_id, one.kind) == (query.encoder_id, query.kind):
            rows.refuse_other_encoder(query, one.sha256, one.prompt, one.dim)
            return one
    names = ", ".join(f"{one.encoder_id} ({one.kind})" for one in known) or "none"
    raise HubIndexError(
        f"the index has no vectors of encoder {query.encoder_id!r} ({query.kind}); known: {names}. Embed its adapters "
        "with this encoder first (Index.put_embeddings)"
    )


def load_matrix(connection: sqlite3.Connection, encoder: Encoder, base: str | None, folder: Path | None) -> Matrix:
    """Return the vectors of one encoder and base: from a file where it still holds, else from the tables.

    Args:
        connection: In a transaction.
        encoder: Whose vectors.
        base: Only adapters of this base model; None: all.
        folder: Where the files are; None: nothing is read or written there.

    Raises:
        HubIndexError: A vector in the tables has the wrong size; the index is damaged.
    """
    import numpy as np

    numbers = np.array(_stamps(connection, encoder, base), dtype=np.int64).reshape(-1, 2)
    found = np.ascontiguousarray(numbers[:, 0])
    if not len(found):
        return Matrix(found, np.zeros((0, encoder.dim), np.float32))
    path = folder / cache_name(encoder, base, numbers) if folder else None
    unit = _read_cache(path, (len(found), encoder.dim)) if path else None
    if unit is None:
        unit = _from_tables(connection, encoder, found)
        if path:
            _write_cache(path, unit)
    return Matrix(found, unit)


def cache_name(encoder: Encoder, base: str | None, numbers: np.ndarray) -> str:
    """Return the name of the file made of these rows: what it is of, then exactly which vectors."""
    digest = hashlib.sha256(repr((*encoder[1:], base)).encode())
    digest.update(numbers.astype("<i8").tobytes())
    return f"{cache_key(encoder, base)}-{digest.hexdigest()[:32]}.npy"


def cache_key(encoder: Encoder, base: str | None) -> str:
    """Return the first part of the names of all files of an encoder, kind and base."""
    return hashlib.sha256(repr((encoder.encoder_id, encoder.kind, base)).encode()).hexdigest()[:16]


def best(matrix: Matrix, query: EmbeddingRecord) -> Iterator[tuple[int, float]]:
    """Yield ``(row, cosine)`` of all adapters, the nearest first; of equal ones the one added first.

    Only as much is sorted as is asked for.
    """
    import numpy as np

    length = np.linalg.norm(query.array().astype(np.float64))
    if not 0 < length < np.inf:
        raise HubIndexError(f"the query's vector has length {length}; it needs a direction to be compared")
    cosine_N = matrix.unit @ (query.array() / length).astype(np.float32)
    done, wanted = 0, 256
    while done < len(cosine_N):
        order = _largest(cosine_N, wanted)
        for place in order[done:].tolist():
            yield int(matrix.rows[place]), float(cosine_N[place])
        done, wanted = len(order), wanted * 8


def _largest(values_N: np.ndarray, count: int) -> np.ndarray:
    """Return the places of at least ``count`` largest values and all equal to the last of them, best first."""
    import numpy as np

    if count >= len(values_N):
        return np.argsort(-values_N, kind="stable")
    last = np.partition(values_N, len(values_N) - count)[len(values_N) - count]
    places = np.flatnonzero(values_N >= last)
    return places[np.argsort(-values_N[places], kind="stable")]


def _stamps(connection: sqlite3.Connection, encoder: Encoder, base: str | None) -> list[tuple[int, int]]:
    if base is None:
        query = "SELECT adapter_id, stamp FROM embedding WHERE encoder = ? ORDER BY adapter_id"
        return connection.execute(query, (encoder.row,)).fetchall()
    query = (
        "SELECT adapter_id, stamp FROM adapter JOIN embedding ON adapter_id = adapter.id AND encoder = ? "
        "WHERE base_id = ? ORDER BY adapter_id"
    )
    return connection.execute(query, (encoder.row, base)).fetchall()


def _from_tables(connection: sqlite3.Connection, encoder: Encoder, found: np.ndarray) -> np.ndarray:
    import numpy as np

    unit = np.empty((len(found), encoder.dim), np.float32)
    wanted = dict(zip(found.tolist(), range(len(found)), strict=True))
    cursor = connection.execute("SELECT adapter_id, vec FROM embedding WHERE encoder = ?", (encoder.row,))
    while block := cursor.fetchmany(_BLOCK):
        block = [(row, vec) for row, vec in block if row in wanted]
        bad = [row for row, vec in block if not isinstance(vec, bytes) or len(vec) != 4 * encoder.dim]
        if bad:
            raise HubIndexError(f"the vector of row {bad[0]} has not {encoder.dim} entries; the index is damaged")
        values = np.frombuffer(b"".join(vec for _, vec in block), "<f4").reshape(len(block), encoder.dim)
        wide = values.astype(np.float64)
        length = np.linalg.norm(wide, axis=1, keepdims=True)
        unit[[wanted[row] for row, _ in block]] = np.divide(wide, length, out=np.zeros_like(wide), where=length > 0)
    return unit


def _write_cache(path: Path, unit: np.ndarray) -> None:
    """Publish the file and drop older ones of the same key; a disk that is full costs time, not answers."""
    import numpy as np

    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": unit.shape})
    data = unit.astype("<f4", copy=False).data.cast("B")
    try:
        path.parent.mkdir(exist_ok=True)
        publish_file(path, (head.getvalue(), data, struct.pack("<I", zlib.crc32(data))))
    except OSError as error:
        logger.warning(
            "%s: the copy of the vectors could not be written (%s); it is made again next time", path, error
        )
        return
    for old in path.parent.glob(path.name.partition("-")[0] + "-*.npy"):
        if old != path:
            old.unlink(missing_ok=True)


def _read_cache(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the file's matrix where it is whole and of this shape.

    It is read, not memory-mapped: a mapped file that someone truncates kills the process.
    """
    import numpy as np

    try:
        with path.open("rb") as stream:
            if not _header_fits(stream, shape):
                return None
            unit = np.fromfile(stream, "<f4", count=shape[0] * shape[1])
            tail = stream.read(8)
    except FileNotFoundError:
        return None
    if unit.size != shape[0] * shape[1] or tail != struct.pack("<I", zlib.crc32(unit.data.cast("B"))):
        logger.warning("%s: damaged; made again from the index", path)
        return None
    return unit.astype(np.float32, copy=False).reshape(shape)


def _header_fits(stream: BinaryIO, shape: tuple[int, int]) -> bool:
    import numpy as np

    try:
        np.lib.format.read_magic(stream)
        return np.lib.format.read_array_header_1_0(stream) == (shape, False, np.dtype("<f4"))
    except ValueError:
        return False
