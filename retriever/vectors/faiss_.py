"""``faiss``: Flat, IVF or HNSW indexes of faiss-cpu, from some 2e5 vectors on (extra ``ann``).

The file's name carries an underscore because ``faiss`` is the library's.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from compose.errors import AdapterFormatError, BackendUnavailableError, ComposeError
from compose.retriever.vectors import VECTOR_BACKENDS, Hits, Payload
from compose.retriever.vectors.numpy_ import exact
from compose.retriever.vectors.table import Table, check_k, check_rows

Kind = Literal["auto", "flat", "ivf", "hnsw"]

APPROXIMATE_FROM = 200_000
"""Vectors from which ``kind="auto"`` takes IVF."""
INDEX_FILE = "index.faiss"
_MAX_INDEX_BYTES = 64 * 1024**3
_POINTS_PER_LIST = 39
"""Below this faiss itself warns that k-means has too few points."""
_FEW = 0.1
"""Filters that leave a smaller part than this are searched exactly: a graph loses hits when most nodes are hidden."""
_DEAD = 0.2
"""Part of dead rows from which the index is built anew."""


@VECTOR_BACKENDS.register("faiss")
class FaissVectors:
    """An index over the inner product of unit rows, made at the first search and extended by later additions.

    IVF and HNSW are approximate. Deleted vectors are hidden from searches and leave the index when they are a fifth of
    it. A persisted index is read by faiss's own C++ parser, which is not made for hostile files: load your own.

    Args:
        dim: ``D``.
        kind: ``"flat"`` (exact), ``"ivf"`` (inverted lists: quick to build), ``"hnsw"`` (a graph: quick to search), or
            ``"auto"``: flat, and IVF from `APPROXIMATE_FROM` vectors on.
        lists: Of IVF; None: ``4 sqrt(N)``.
        probes: Lists that IVF searches.
        neighbours: Of an HNSW node.
        build_width: ``efConstruction`` of HNSW.
        search_width: ``efSearch`` of HNSW; raised to ``k`` where that is larger.

    Raises:
        BackendUnavailableError: faiss is not installed.
    """

    summary: ClassVar[str] = "Flat, IVF, HNSW; approximate from 2e5 vectors on"

    def __init__(
        self,
        dim: int,
        *,
        kind: Kind = "auto",
        lists: int | None = None,
        probes: int = 16,
        neighbours: int = 32,
        build_width: int = 100,
        search_width: int = 64,
    ) -> None:
        if importlib.util.find_spec("faiss") is None:
            raise BackendUnavailableError("vector backend 'faiss' needs faiss-cpu: pip install 'adapter-compose[ann]'")
        if kind not in ("auto", "flat", "ivf", "hnsw"):
            raise ComposeError(f"kind must be auto, flat, ivf or hnsw, got {kind!r}")
        self._options: dict[str, Any] = {
            "kind": kind, "lists": lists, "probes": probes, "neighbours": neighbours, "build_width": build_width,
            "search_width": search_width,
        }  # fmt: skip
        self._table = Table(dim)
        self._index: Any = None
        self._made: str = ""
        self.dim = dim

    def __len__(self) -> int:
        return len(self._table)

    def add(self, ids: Sequence[str], vectors: np.ndarray, payloads: Sequence[Payload] | None = None) -> None:
        """Add unit rows."""
        self._table.add(ids, vectors, payloads)

    def search(self, queries: np.ndarray, k: int, where: Payload | None = None) -> Hits:
        """Return the ``k`` closest vectors of every query, as far as the kind of index finds them."""
        unit = check_rows(queries, self.dim, "queries")
        rows = self._table.rows_where(where) if where else None
        left = len(self) if rows is None else len(rows)
        width = min(check_k(k), left)
        if width == 0 or len(unit) == 0:
            return self._table.hits(np.zeros((len(unit), width), np.int64), np.zeros((len(unit), width)))
        if rows is not None and left < _FEW * len(self):
            return self._table.hits(*exact(unit, *self._table.subset(where), width))
        index = self._current()
        scores, found = index.search(unit, width, params=self._parameters(rows, width))
        return self._table.hits(found, scores)

    def delete(self, ids: Sequence[str]) -> None:
        """Hide vectors from searches."""
        self._table.delete(ids)
        if len(self) < (1 - _DEAD) * len(self._table.ids):
            self._table.compact()
            self._index = None

    def filter(self, where: Payload) -> tuple[str, ...]:
        """Return the ids whose payload has these values."""
        return tuple(self._table.ids[row] for row in self._table.rows_where(where))

    def persist(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write table and index."""
        import faiss

        if len(self) < len(self._table.ids):
            self._table.compact()
            self._index = None
        more = {INDEX_FILE: faiss.serialize_index(self._current()).tobytes()} if len(self) else {}
        options = {**self._options, "made": self._made}
        return self._table.persist(folder, "faiss", options, more, overwrite)

    @classmethod
    def restore(cls, folder: Path) -> FaissVectors:
        """Read table and index.

        Raises:
            AdapterFormatError: They do not belong together.
        """
        import faiss

        from compose.files.safetensors_file import read_bytes

        table, options = Table.restore(folder)
        made = options.pop("made", "")
        backend = cls(table.dim, **options)
        backend._table = table
        if len(table):
            data = read_bytes(folder / INDEX_FILE, max_bytes=_MAX_INDEX_BYTES)
            index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
            if index.d != table.dim or index.ntotal != len(table):
                raise AdapterFormatError(
                    f"{folder}: {INDEX_FILE} holds {index.ntotal} vectors of {index.d} entries, the table "
                    f"{len(table)} of {table.dim}; build it again"
                )
            backend._index, backend._made = index, made
        return backend

    def _current(self) -> Any:
        """Return the index over all rows, dead ones included, brought up to date."""
        total = len(self._table.ids)
        kind = self._options["kind"]
        if kind == "auto":
            kind = "ivf" if total >= APPROXIMATE_FROM else "flat"
        if self._index is None or self._made != kind:
            self._index, self._made = self._new(kind, total), kind
        if self._index.ntotal < total:
            self._index.add(self._table.vectors[self._index.ntotal :])
        return self._index

    def _new(self, kind: str, total: int) -> Any:
        faiss: Any = importlib.import_module("faiss")  # its type stubs lack what is used here
        metric = faiss.METRIC_INNER_PRODUCT
        if kind == "flat":
            return faiss.IndexFlat(self.dim, metric)
        if kind == "hnsw":
            index = faiss.IndexHNSWFlat(self.dim, self._options["neighbours"], metric)
            index.hnsw.efConstruction = self._options["build_width"]
            return index
        wanted = self._options["lists"] or int(4 * math.sqrt(total))
        lists = max(1, min(wanted, total // _POINTS_PER_LIST))
        index = faiss.IndexIVFFlat(faiss.IndexFlat(self.dim, metric), self.dim, lists, metric)
        index.train(self._table.vectors)
        return index

    def _parameters(self, rows: np.ndarray | None, width: int) -> Any:
        faiss: Any = importlib.import_module("faiss")
        selector = None
        if rows is not None or len(self) < len(self._table.ids):
            selector = faiss.IDSelectorBatch(np.flatnonzero(self._table.alive) if rows is None else rows)
        if self._made == "ivf":
            return faiss.SearchParametersIVF(sel=selector, nprobe=self._options["probes"])
        if self._made == "hnsw":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=max(width, self._options["search_width"]))
        return faiss.SearchParameters(sel=selector)
