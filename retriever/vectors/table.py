"""The table under the backends of one machine: ids, vectors, payloads, in the order of adding; not a backend."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compose.errors import (
    AdapterFormatError,
    ComposeError,
    DuplicateNameError,
    IncompatibleError,
    UnknownNameError,
    unknown_name,
)
from compose.files.publish import publish_folder
from compose.files.strict_json import parse_object
from compose.retriever.vectors import Hits, Payload, Value

FACTS_FILE = "backend.json"
VECTORS_FILE = "vectors.safetensors"
VERSION = 1
_MAX_FACTS_BYTES = 1024 * 2**20
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_UNIT = 1e-3
"""How far from 1 the length of a float32 unit row may be."""
_SUBSETS = 8


class Table:
    """Rows of one kind; deleted rows stay in place, dead, until `compact`.

    Attributes:
        dim: ``D``.
        ids: Of all rows.
        payloads: Of all rows.
        alive: ``(N,)`` bool.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ComposeError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.ids: list[str] = []
        self.payloads: list[Payload] = []
        self.alive = np.zeros(0, bool)
        self._space = np.zeros((0, dim), np.float32)
        self._rows: dict[str, int] = {}
        self._subsets: dict[tuple[tuple[str, Value], ...], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Rows that are not deleted."""
        return len(self._rows)

    @property
    def vectors(self) -> np.ndarray:
        """``(N, D)`` of all rows, dead ones included; a view."""
        return self._space[: len(self.ids)]

    def add(self, ids: Sequence[str], vectors: np.ndarray, payloads: Sequence[Payload] | None) -> None:
        """Append rows; see `compose.retriever.vectors.VectorBackend.add`."""
        rows = check_rows(vectors, self.dim, "vectors")
        given = check_payloads(ids, rows, payloads)
        check_new(ids, self._rows)
        needed = len(self.ids) + len(ids)
        if needed > len(self._space):  # doubling keeps adding linear
            space = np.zeros((max(needed, 2 * len(self._space)), self.dim), np.float32)
            space[: len(self.ids)] = self.vectors
            self._space = space
        self._space[len(self.ids) : needed] = rows
        self._rows.update(zip(ids, range(len(self.ids), needed), strict=True))
        self.ids += ids
        self.payloads += given
        self.alive = np.concatenate([self.alive, np.ones(len(ids), bool)])
        self._subsets.clear()

    def delete(self, ids: Sequence[str]) -> None:
        """Mark rows as dead."""
        for id_ in ids:
            if id_ not in self._rows:
                raise UnknownNameError(unknown_name("id", id_, self._rows))
        for id_ in dict.fromkeys(ids):
            self.alive[self._rows.pop(id_)] = False
        self._subsets.clear()

    def compact(self) -> None:
        """Drop dead rows; the others keep their order."""
        kept = np.flatnonzero(self.alive)
        self._space = self._space[kept]
        self.ids = [self.ids[row] for row in kept]
        self.payloads = [self.payloads[row] for row in kept]
        self.alive = np.ones(len(kept), bool)
        self._rows = {id_: row for row, id_ in enumerate(self.ids)}
        self._subsets.clear()

    def rows_where(self, where: Payload | None) -> np.ndarray:
        """Return the alive rows whose payload has these values, ascending."""
        if not where:
            return np.flatnonzero(self.alive)
        wanted = check_where(where).items()
        return np.array(
            [
                row
                for row in np.flatnonzero(self.alive)
                if all(same(self.payloads[row].get(field), value) for field, value in wanted)
            ],
            np.int64,
        )

    def subset(self, where: Payload | None) -> tuple[np.ndarray, np.ndarray]:
        """Return matching rows and their vectors, gathered once per filter: a matrix per base model, for example.

        Gathering costs more than the search itself, so the last 8 filters' matrices are kept until the next change.
        """
        if not where and len(self) == len(self.ids):
            return np.arange(len(self.ids)), self.vectors
        key = tuple(sorted((where or {}).items()))
        if key not in self._subsets:
            rows = self.rows_where(where)
            if len(self._subsets) >= _SUBSETS:
                del self._subsets[next(iter(self._subsets))]
            self._subsets[key] = rows, self.vectors[rows]
        return self._subsets[key]

    def hits(self, rows: np.ndarray, scores: np.ndarray) -> Hits:
        """Name found rows ``(B, K)``; -1 stands for none."""
        ids = tuple(tuple(self.ids[row] for row in line if row >= 0) for line in rows)
        return Hits(ids, np.where(rows >= 0, scores, -np.inf).astype(np.float32))

    def persist(
        self, folder: str | Path, backend: str, options: Mapping[str, Any], more: Mapping[str, bytes], overwrite: bool
    ) -> Path:
        """Write alive rows, the backend's name and options, and further files, whole or not at all."""
        from safetensors.numpy import save

        rows = np.flatnonzero(self.alive)
        facts = {
            "version": VERSION,
            "backend": backend,
            "dim": self.dim,
            "options": dict(options),
            "ids": [self.ids[row] for row in rows],
            "payloads": [dict(self.payloads[row]) for row in rows],
        }
        files = {FACTS_FILE: json.dumps(facts, ensure_ascii=False).encode(), **more}
        if len(rows):  # safetensors readers refuse tensors without entries
            files[VECTORS_FILE] = save({"vectors": np.ascontiguousarray(self.vectors[rows])})
        return publish_folder(files, Path(folder), overwrite=overwrite)

    @classmethod
    def restore(cls, folder: Path) -> tuple[Table, dict[str, Any]]:
        """Read what `persist` wrote: the table, and the options.

        Raises:
            AdapterFormatError: The files are damaged or do not fit together.
        """
        from compose.files.safetensors_file import load

        facts = read_facts(folder)
        table = cls(facts["dim"])
        if facts["ids"]:
            tensors = load(folder / VECTORS_FILE).tensors
            if set(tensors) != {"vectors"} or len(tensors["vectors"]) != len(facts["ids"]):
                raise AdapterFormatError(f"{folder}: {FACTS_FILE} and {VECTORS_FILE} do not belong together")
            table.add(facts["ids"], tensors["vectors"].numpy(), facts["payloads"])
        return table, facts["options"]


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the checked content of a persisted backend's ``backend.json``.

    Raises:
        AdapterFormatError: It is missing, damaged, or written by a newer version.
    """
    from compose.files.safetensors_file import read_bytes

    path = folder / FACTS_FILE
    facts = parse_object(read_bytes(path, max_bytes=_MAX_FACTS_BYTES), path)
    kinds = {"backend": str, "dim": int, "options": dict, "ids": list, "payloads": list}
    if facts.get("version") != VERSION or any(not isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise AdapterFormatError(f"{path}: not a vector backend of version {VERSION}; needs {', '.join(kinds)}")
    return facts


def check_rows(vectors: np.ndarray, dim: int, what: str) -> np.ndarray:
    """Return ``(N, D)`` float32.

    Raises:
        IncompatibleError: Another shape, or rows that are no unit vectors.
    """
    rows = np.asarray(vectors, np.float32)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise IncompatibleError(f"{what} must have shape (N, {dim}), got {rows.shape}")
    off = np.abs(np.linalg.norm(rows, axis=1) - 1)
    bad = np.flatnonzero(~(off < _UNIT))
    if bad.size:
        raise IncompatibleError(f"{what} must be unit rows; row {bad[0]} is off by {off[bad[0]]:.3g}")
    return rows


def check_payloads(ids: Sequence[str], rows: np.ndarray, payloads: Sequence[Payload] | None) -> list[Payload]:
    """Return one payload per id.

    Raises:
        IncompatibleError: Their numbers differ.
        ComposeError: A field's name or value is not allowed.
    """
    given: list[Payload] = [{} for _ in ids]
    if payloads is not None:
        given = [dict(check_where(payload)) for payload in payloads]
    if not len(ids) == len(rows) == len(given):
        raise IncompatibleError(f"{len(ids)} ids, {len(rows)} vectors and {len(given)} payloads; give one each")
    return given


def check_where(where: Payload) -> Payload:
    """Return ``where`` where every field is a name and every value text, a whole number or a truth value."""
    for field, value in where.items():
        if not _FIELD.fullmatch(field) or not isinstance(value, str | int):
            raise ComposeError(
                f"payload field {field!r:.80} = {value!r:.80} is not allowed; fields are letters, digits and _, "
                "values text, whole numbers or truth values"
            )
    return where


def check_new(ids: Sequence[str], known: Mapping[str, int]) -> None:
    """Raise DuplicateNameError for ids that are known, or given twice."""
    taken = [id_ for id_ in ids if id_ in known]
    if taken or len(set(ids)) != len(ids):
        twice = taken or sorted({id_ for id_ in ids if list(ids).count(id_) > 1})
        raise DuplicateNameError(f"ids are taken or given twice: {twice[:5]}; delete them first")


def check_k(k: int) -> int:
    """Return ``k`` where it is at least 1."""
    if k < 1:
        raise ComposeError(f"k must be at least 1, got {k}")
    return k


def same(left: object, right: Value) -> bool:
    """Whether two payload values are the same; ``1`` and ``True`` are not."""
    return type(left) is type(right) and left == right
