"""The index of known adapters: one SQLite file, written by transactions, read without torch."""

from __future__ import annotations

import os
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compose.errors import HubIndexError, UnknownNameError, unknown_name
from compose.hub_index import changes, checking, rows, schema, search, vectors
from compose.hub_index.changes import Added, Swept
from compose.hub_index.database import Journal, connect, told, transaction
from compose.hub_index.records import (
    STATUSES,
    AdapterRecord,
    AdapterSummary,
    AuditFinding,
    EmbeddingRecord,
    ExampleRecord,
    ScoreRecord,
    StatRecord,
    Status,
    check_adapter_name,
)
from compose.hub_index.search import Filters, Hit

if TYPE_CHECKING:
    import numpy as np

_MATRICES = 4


class Info(NamedTuple):
    """An index in numbers.

    Attributes:
        schema: Version of the file's tables.
        num_bytes: Size of the file and its write-ahead log.
        statuses: Status -> number of adapters.
        bases: Base model -> number of active adapters.
        encoders: Whose vectors it has.
    """

    schema: int
    num_bytes: int
    statuses: Mapping[str, int]
    bases: Mapping[str, int]
    encoders: tuple[vectors.Encoder, ...]


class Index:
    """An open index. Use `open`; one thread and one process use one object, any number of them one file.

    What a method writes is on the disk when it returns, whole; a reader sees all of it or nothing.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._connection = connection
        self._process = os.getpid()
        self._matrices: OrderedDict[tuple[int, str | None], tuple[tuple[int, int], vectors.Matrix]] = OrderedDict()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        create: bool = False,
        readonly: bool = False,
        journal: Journal = "wal",
        timeout: float = 60.0,
    ) -> Index:
        """Open an index, made or brought to the newest schema where that is needed and allowed.

        Args:
            path: The file.
            create: Make it where it is missing.
            readonly: Never write.
            journal: ``"delete"`` for a network file system, where one machine writes at a time.
            timeout: Seconds to wait for another process's transaction.

        Raises:
            HubIndexError: Missing, foreign, damaged or newer; or on a network file system with ``journal="wal"``.
            BackendUnavailableError: SQLite is too old or has no FTS5.
            OSError: The disk is full or failing.
        """
        if create and readonly:
            raise HubIndexError("create=True and readonly=True exclude each other; give one of them")
        if journal not in ("wal", "delete"):
            raise HubIndexError(f"journal must be 'wal' or 'delete', got {journal!r}")
        path = Path(path).absolute()  # the folder of the process may change later
        connection = connect(path, create=create, readonly=readonly, journal=journal, timeout=timeout)
        return cls(path, connection, readonly=readonly)

    def close(self) -> None:
        """Close the file; the object cannot be used any more."""
        self._matrices.clear()
        self._connection.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Return the number of adapters that are not removed."""
        with self._reading() as connection:
            query = "SELECT count(*) FROM adapter WHERE status IN ('active', 'quarantined')"
            return int(connection.execute(query).fetchone()[0])

    def __contains__(self, name: object) -> bool:
        with self._reading() as connection:
            return isinstance(name, str) and _row_of(connection, name) is not None

    def add(self, record: AdapterRecord, *, replace: bool = False) -> Added:
        """Add an adapter with all that belongs to it; see `add_all`."""
        return self.add_all([record], replace=replace)[0]

    def add_all(self, records: Iterable[AdapterRecord], *, replace: bool = False) -> tuple[Added, ...]:
        """Add adapters in one transaction: all or none.

        An adapter is known by its content (`AdapterRecord.sha256`): adding the same again changes nothing, under
        whatever name. With ``replace`` the record takes the place of an adapter with its content or its name.

        Raises:
            DuplicateNameError: Names that other adapters have, all of them.
            HubIndexError: Vectors of an encoder that the index has otherwise.
        """
        with self._writing() as connection:
            return changes.add_all(connection, self.path, records, replace, _now())

    def update(
        self,
        name: str,
        *,
        status: Status | None = None,
        reasons: Sequence[str] | None = None,
        stats: Sequence[StatRecord] | None = None,
        findings: Sequence[AuditFinding] | None = None,
        scores: Sequence[ScoreRecord] | None = None,
        examples: Sequence[ExampleRecord] | None = None,
    ) -> None:
        """Change an adapter in one transaction: what is given replaces what was there, whole.

        ``"active"`` clears the reasons unless others are given. Vectors have their own `put_embeddings`.

        Raises:
            UnknownNameError: No such adapter.
            HubIndexError: A value that a record cannot have.
        """
        children = {"stats": stats, "findings": findings, "scores": scores, "examples": examples}
        given: dict[str, Any] = {kind: tuple(one) for kind, one in children.items() if one is not None}
        columns: dict[str, Any] = {} if status is None else {"status": status}
        if reasons is not None or status == "active":
            columns["reasons"] = tuple(reasons or ())
        AdapterRecord(name=check_adapter_name(name), source="description", **given, **columns)  # checks the values
        with self._writing() as connection:
            row = self._need_row(connection, name)
            rows.update_columns(connection, row, columns)
            for kind, records in given.items():
                rows.write_children(connection, row, kind, records, _now(), replace=True)

    def put_embeddings(self, embeddings: Mapping[str, Iterable[EmbeddingRecord]]) -> None:
        """Write vectors of adapters by name, in one transaction; one of the same encoder and kind is replaced.

        Raises:
            UnknownNameError: No such adapter.
            HubIndexError: The index's vectors of this encoder and kind were made with another hash or prompt.
        """
        with self._writing() as connection:
            for name, records in embeddings.items():
                rows.write_embeddings(connection, self._need_row(connection, name), records)

    def forget_encoder(self, encoder_id: str, kind: str | None = None) -> int:
        """Delete the vectors of an encoder, of one kind or of all, and return how many there were.

        Raises:
            UnknownNameError: The index has none of this name and kind.
        """
        with self._writing() as connection:
            known = vectors.encoders(connection)
            gone = [one for one in known if one.encoder_id == encoder_id and kind in (None, one.kind)]
            if not gone:
                names = [f"{one.encoder_id} ({one.kind})" for one in known]
                wanted = encoder_id if kind is None else f"{encoder_id} ({kind})"
                raise UnknownNameError(unknown_name("encoder", wanted, names))
            count = 0
            for one in gone:
                count += connection.execute("DELETE FROM embedding WHERE encoder = ?", (one.row,)).rowcount
                connection.execute("DELETE FROM encoder WHERE id = ?", (one.row,))
            return count

    def remove(self, names: Iterable[str], *, reason: str = "removed by hand") -> None:
        """Mark adapters as removed, all or none: they are found no more and their names are free; `gc` deletes them.

        Raises:
            UnknownNameError: No such adapter.
        """
        with self._writing() as connection:
            for name in dict.fromkeys(names):
                row = self._need_row(connection, name)
                rows.update_columns(connection, row, {"status": "removed", "reasons": (reason,)})

    def gc(self, *, dry_run: bool = False, compact: bool = False) -> Swept:
        """Delete what is removed, encoders without vectors, and copies of vectors that no encoder of the index needs.

        Args:
            dry_run: Only say what would go.
            compact: Also give the freed pages back to the file system; needs the size of the index twice.
        """
        with self._reading() if dry_run else self._writing() as connection:
            names, idle = changes.sweep(connection, dry_run=dry_run)
            files = changes.stale_files(connection, self._folder, idle)
        if not dry_run:
            for file in files:
                file.unlink(missing_ok=True)
            with told(self.path):
                if compact:
                    self._connection.execute("VACUUM")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        encoders = tuple(f"{one.encoder_id} ({one.kind})" for one in idle)
        return Swept(names, tuple(file.name for file in files), encoders)

    def get(self, name: str) -> AdapterRecord:
        """Return an adapter with all that belongs to it, by its name or its whole content hash.

        Raises:
            UnknownNameError: No such adapter, or it is removed.
        """
        with self._reading() as connection:
            return rows.read_adapter(connection, self._need_row(connection, name))

    def ls(self, filters: Filters | None = None, *, limit: int | None = None) -> list[AdapterSummary]:
        """Return the adapters that pass the filters (all active ones by default), by name."""
        with self._reading() as connection:
            clause, values = (filters or Filters()).clause()
            found = connection.execute(
                f"SELECT {rows.SUMMARY_COLUMNS} FROM adapter WHERE {clause} ORDER BY name, id LIMIT ?",
                [*values, -1 if limit is None else limit],
            )
            return [rows.summary(one) for one in found]

    def read(self, kind: rows.ChildKind, filters: Filters | None = None) -> dict[str, tuple[Any, ...]]:
        """Return one kind of record (``"stats"``, ``"examples"``, ...) of the adapters that pass, by name."""
        if kind not in rows.CHILDREN:
            raise UnknownNameError(unknown_name("kind of record", kind, rows.CHILDREN))
        with self._reading() as connection:
            found = search.by_name(connection, filters or Filters(), None)
            children = rows.read_children(connection, kind, found)
            names = rows.read_names(connection, found)
            return {names[row]: children.get(row, ()) for row in found}

    def records(self, filters: Filters | None = None) -> Iterator[AdapterRecord]:
        """Yield the adapters that pass the filters with all that belongs to them, by name, as of one moment."""
        with Index.open(self.path, readonly=True) as other, other._reading() as connection:
            for row in search.by_name(connection, filters or Filters(), None):
                yield rows.read_adapter(connection, row)

    def query(
        self,
        text: str | None = None,
        *,
        base: str | None = None,
        task: str | None = None,
        rank: tuple[int, int] | None = None,
        license: str | None = None,
        min_score: tuple[str, str, float] | None = None,
        status: str = "active",
        vector: EmbeddingRecord | None = None,
        k: int = 10,
    ) -> list[Hit]:
        """Return the ``k`` best adapters for a text, a vector or both among those that pass the filters.

        A text is words, any of which count (bm25); nothing in it is an operator. With both, the two rankings are fused
        by reciprocal ranks (`compose.hub_index.search`). With neither, the first ``k`` by name. Fewer than ``k`` come
        back where fewer pass, or have a word of the text.

        Args:
            text: What the adapter should be about.
            base: The base model's name or its fingerprint.
            task: A tag, a data set or the task of a score.
            rank: ``(lowest, highest)`` that all its ranks lie in.
            license: As the card says it.
            min_score: ``(task, metric, value)``.
            status: A status or ``"any"``.
            vector: The query under an encoder; its kind says which vectors it is compared with.
            k: Number of results.

        Raises:
            HubIndexError: A filter that cannot be; or the index has no vectors of exactly this encoder.
        """
        search.check_k(k)
        filters = Filters(base=base, task=task, rank=rank, license=license, min_score=min_score, status=status)
        with self._reading() as connection:
            count = search.depth(k) if text is not None and vector is not None else k
            spoken = None if text is None else search.by_text(connection, text, filters, count)
            near = None if vector is None else self._nearest(connection, vector, filters, count)
            return _hits(connection, spoken, near, filters, k)

    def matrix(self, encoder_id: str, kind: str, base: str | None = None) -> tuple[list[str], np.ndarray]:
        """Return the unit vectors ``(N, D)`` of the active adapters under one encoder, and their names.

        Raises:
            UnknownNameError: The index has no vectors of this name and kind.
        """
        with self._reading() as connection:
            known = {(one.encoder_id, one.kind): one for one in vectors.encoders(connection)}
            if (encoder_id, kind) not in known:
                shown = [f"{one} ({word})" for one, word in known]
                raise UnknownNameError(unknown_name("encoder", f"{encoder_id} ({kind})", shown))
            found = self._matrix(connection, known[encoder_id, kind], base)
            names = rows.read_names(connection, found.rows.tolist(), status="active")
            active = [place for place, row in enumerate(found.rows.tolist()) if row in names]
            return [names[int(found.rows[place])] for place in active], found.unit[active]

    def folder_of(self, adapter: AdapterRecord | AdapterSummary) -> Path:
        """Return the folder of an adapter's files; a relative path is relative to the index.

        Raises:
            HubIndexError: It has none: it is known by description alone.
        """
        if not adapter.path:
            text = "is known by description alone, there are no files to load; add its folder"
            raise HubIndexError(f"adapter {adapter.name!r} {text}")
        return self.path.parent / adapter.path

    def info(self) -> Info:
        """Return the index in numbers."""
        with self._reading() as connection:
            statuses = dict(connection.execute("SELECT status, count(*) FROM adapter GROUP BY status").fetchall())
            bases = connection.execute(
                "SELECT base_id, count(*) FROM adapter WHERE status = 'active' GROUP BY base_id ORDER BY 2 DESC, 1"
            ).fetchall()
            files = [self.path, self.path.with_name(self.path.name + "-wal")]
            size = sum(file.stat().st_size for file in files if file.exists())
            counts = {status: statuses.get(status, 0) for status in STATUSES}
            return Info(len(schema.STEPS), size, counts, dict(bases), tuple(vectors.encoders(connection)))

    def check(self, *, records: bool = True) -> list[str]:
        """Read everything and return what is wrong, ``[]`` where nothing is.

        Pages, references, the text index (not where the index is opened read-only) and, with ``records``, that every
        row is a record. The adapters' own files are not looked at.
        """
        with self._reading() as connection:
            problems = checking.problems_of(connection, records=records)
        if not self.readonly:
            with self._writing() as connection:
                problems += checking.text_problems(connection)
        return problems

    @property
    def _folder(self) -> Path:
        """Where the copies of vectors are."""
        return self.path.with_name(self.path.name + ".vectors")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        self._check_process()
        with transaction(self._connection, self.path):
            yield self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        self._check_process()
        if self.readonly:
            raise HubIndexError(f"{self.path}: opened with readonly=True; open it without to change it")
        with transaction(self._connection, self.path, write=True):
            yield self._connection

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise HubIndexError(
                f"{self.path}: opened before this process was forked off; used here it would damage the file. Open "
                "the index anew in this process"
            )

    def _need_row(self, connection: sqlite3.Connection, name: str) -> int:
        row = _row_of(connection, name)
        if row is None:
            raise UnknownNameError(f"{self.path}: {unknown_name('adapter', name, rows.names_like(connection, name))}")
        return row

    def _nearest(
        self, connection: sqlite3.Connection, vector: EmbeddingRecord, filters: Filters, count: int
    ) -> search.Ranked:
        encoder = vectors.encoder_of(connection, vector)
        base = None if filters.base is None or search.is_hash(filters.base) else filters.base
        return search.first(connection, vectors.best(self._matrix(connection, encoder, base), vector), filters, count)

    def _matrix(self, connection: sqlite3.Connection, encoder: vectors.Encoder, base: str | None) -> vectors.Matrix:
        """Return a matrix, the same object until somebody writes to the index."""
        (theirs,) = connection.execute("PRAGMA data_version").fetchone()
        state = (theirs, connection.total_changes)
        key = (encoder.row, base)
        held = self._matrices.pop(key, None)
        if held is None or held[0] != state:
            folder = None if self.readonly else self._folder
            held = (state, vectors.load_matrix(connection, encoder, base, folder))
        self._matrices[key] = held
        while len(self._matrices) > _MATRICES:
            self._matrices.popitem(last=False)
        return held[1]


def _row_of(connection: sqlite3.Connection, name: str) -> int | None:
    for column in ("name", "sha256"):
        query = f"SELECT id FROM adapter WHERE {column} = ? AND status <> 'removed'"
        if found := connection.execute(query, (name,)).fetchone():
            return int(found[0])
    return None


def _hits(
    connection: sqlite3.Connection,
    spoken: search.Ranked | None,
    near: search.Ranked | None,
    filters: Filters,
    k: int,
) -> list[Hit]:
    bm25 = {} if spoken is None else dict(zip(spoken.rows, spoken.scores, strict=True))
    cosine = {} if near is None else dict(zip(near.rows, near.scores, strict=True))
    if spoken is not None and near is not None:
        fused = search.fuse([spoken.rows, near.rows])
        scores = dict(zip(fused.rows, fused.scores, strict=True))
    elif spoken is not None:
        scores = {row: -value for row, value in bm25.items()}
    elif near is not None:
        scores = cosine
    else:
        scores = dict.fromkeys(search.by_name(connection, filters, k), 0.0)
    best = list(scores)[:k]
    summaries = rows.read_summaries(connection, best)
    return [Hit(summaries[row], scores[row], cosine.get(row), bm25.get(row)) for row in best]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
