"""The tables of an index, as an ordered list of steps: step k takes a file of schema k to schema k + 1.

A step is never edited once it is released; what the next version needs is a new step. All missing steps run in one
transaction, so a file is of the old schema or of the new one and never between. Children of an adapter (``module``,
``score``, ...) hold the fields of the record of that name, in order of ``i``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import lru_cache

from compose.errors import HubIndexError

APPLICATION_ID = 0x434D4958  # "CMIX"

_TABLES = """
CREATE TABLE adapter(
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE,
  sha256_weights TEXT NOT NULL, sha256_config TEXT NOT NULL,
  source TEXT NOT NULL, repo_id TEXT NOT NULL, revision TEXT NOT NULL, path TEXT NOT NULL, format TEXT NOT NULL,
  num_bytes INTEGER NOT NULL, num_tensors INTEGER NOT NULL, num_params INTEGER NOT NULL, dtype TEXT NOT NULL,
  base_id TEXT NOT NULL, base_revision TEXT NOT NULL, base_fingerprint TEXT NOT NULL, base_relation TEXT NOT NULL,
  peft_type TEXT NOT NULL, task_type TEXT NOT NULL, rank_min INTEGER NOT NULL, rank_max INTEGER NOT NULL,
  scaling TEXT NOT NULL, flags TEXT NOT NULL, modules_to_save TEXT NOT NULL,
  title TEXT NOT NULL, summary TEXT NOT NULL, license TEXT NOT NULL, language TEXT NOT NULL, tags TEXT NOT NULL,
  datasets TEXT NOT NULL, train_seed INTEGER, hyper TEXT NOT NULL, created_at TEXT NOT NULL, added_at TEXT NOT NULL,
  status TEXT NOT NULL CHECK(status IN ('active', 'quarantined', 'removed')), reasons TEXT NOT NULL);
CREATE UNIQUE INDEX adapter_name ON adapter(name) WHERE status <> 'removed';
CREATE INDEX adapter_status ON adapter(status, name);
CREATE INDEX adapter_filter ON adapter(base_id, status, rank_min, rank_max, license);
CREATE INDEX adapter_fingerprint ON adapter(base_fingerprint, status, rank_min, rank_max, license);
CREATE INDEX adapter_weights ON adapter(sha256_weights);
CREATE TABLE module(
  adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE, i INTEGER NOT NULL, name TEXT NOT NULL,
  kind TEXT NOT NULL, in_features INTEGER NOT NULL, out_features INTEGER NOT NULL, rank INTEGER NOT NULL,
  scaling REAL NOT NULL, has_dora INTEGER NOT NULL, PRIMARY KEY(adapter_id, i)) WITHOUT ROWID;
CREATE TABLE stat(
  adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE, i INTEGER NOT NULL, module TEXT NOT NULL,
  sigma1 REAL, fro REAL, energy1 REAL, spec_entropy REAL, kurtosis REAL, num_nonfinite INTEGER NOT NULL,
  b_zero INTEGER NOT NULL, PRIMARY KEY(adapter_id, i)) WITHOUT ROWID;
CREATE TABLE audit(
  adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE, i INTEGER NOT NULL, rule TEXT NOT NULL,
  severity TEXT NOT NULL, detail TEXT NOT NULL, module TEXT NOT NULL, tool_version TEXT NOT NULL, at TEXT NOT NULL,
  PRIMARY KEY(adapter_id, i)) WITHOUT ROWID;
CREATE TABLE score(
  adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE, i INTEGER NOT NULL, task TEXT NOT NULL,
  metric TEXT NOT NULL, value REAL NOT NULL, split TEXT NOT NULL, n INTEGER, harness TEXT NOT NULL,
  harness_version TEXT NOT NULL, seed INTEGER, at TEXT NOT NULL, PRIMARY KEY(adapter_id, i)) WITHOUT ROWID;
CREATE INDEX score_value ON score(task, metric, value);
CREATE TABLE example(
  adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE, i INTEGER NOT NULL, input TEXT NOT NULL,
  target TEXT NOT NULL, PRIMARY KEY(adapter_id, i)) WITHOUT ROWID;
CREATE TABLE lineage(
  adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE, i INTEGER NOT NULL, parent_sha256 TEXT NOT NULL,
  weight REAL, method TEXT NOT NULL, config_sha256 TEXT NOT NULL, PRIMARY KEY(adapter_id, i)) WITHOUT ROWID;
CREATE INDEX lineage_parent ON lineage(parent_sha256);
CREATE TABLE encoder(
  id INTEGER PRIMARY KEY, encoder_id TEXT NOT NULL, kind TEXT NOT NULL, sha256 TEXT NOT NULL, prompt TEXT NOT NULL,
  dim INTEGER NOT NULL, UNIQUE(encoder_id, kind));
CREATE TABLE embedding(
  id INTEGER PRIMARY KEY, adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE,
  encoder INTEGER NOT NULL REFERENCES encoder, stamp INTEGER NOT NULL, vec BLOB NOT NULL, UNIQUE(adapter_id, encoder));
CREATE INDEX embedding_stamp ON embedding(encoder, adapter_id, stamp);
CREATE VIRTUAL TABLE adapter_fts USING fts5(
  name, title, summary, tags, datasets, content='adapter', content_rowid='id',
  tokenize='porter unicode61 remove_diacritics 2');
"""

_LABELS = """
CREATE TABLE label(
  value TEXT NOT NULL, kind TEXT NOT NULL, adapter_id INTEGER NOT NULL REFERENCES adapter ON DELETE CASCADE,
  PRIMARY KEY(value, kind, adapter_id)) WITHOUT ROWID;
CREATE INDEX label_adapter ON label(adapter_id);
"""


def _create_tables(connection: sqlite3.Connection) -> None:
    _run(connection, _TABLES)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def _add_labels(connection: sqlite3.Connection) -> None:
    """Schema 2: what an adapter is for (tags, data sets, tasks of its scores), to be found by an index.

    Under schema 1 that needs a scan of every row's JSON.
    """
    _run(connection, _LABELS)
    connection.create_function("compose_casefold", 1, str.casefold, deterministic=True)
    for kind, source in (("tag", "adapter, json_each(adapter.tags)"), ("dataset", "adapter, json_each(datasets)")):
        connection.execute(
            "INSERT OR IGNORE INTO label(value, kind, adapter_id) "
            f"SELECT compose_casefold(json_each.value), '{kind}', adapter.id FROM {source}"
        )
    connection.execute(
        "INSERT OR IGNORE INTO label(value, kind, adapter_id) "
        "SELECT compose_casefold(task), 'task', adapter_id FROM score"
    )


Step = Callable[[sqlite3.Connection], None]

STEPS: tuple[Step, ...] = (_create_tables, _add_labels)


def migrate(connection: sqlite3.Connection, version: int) -> None:
    """Take the file from schema ``version`` to the newest; the caller holds the write transaction."""
    for step in STEPS[version:]:
        step(connection)
    connection.execute(f"PRAGMA user_version = {len(STEPS)}")


def check_schema(connection: sqlite3.Connection, version: int, where: object) -> None:
    """Refuse a file whose tables, indexes, triggers and views are not exactly those of schema ``version``.

    Triggers and views of a file from elsewhere would run inside our statements.

    Raises:
        HubIndexError: They differ.
    """
    wanted = dict(_expected(STEPS[:version]))
    found = dict(_objects(connection))
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise HubIndexError(
            f"{where}: says it is an index of schema {version}, but differs in {', '.join(map(repr, wrong[:5]))}; it "
            "is damaged or was changed by other software. Make a new index and import the JSONL export of this one"
        )


@lru_cache(maxsize=8)
def _expected(steps: Sequence[Step]) -> tuple[tuple[str, str], ...]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for step in steps:
            step(connection)
        return tuple(_objects(connection))
    finally:
        connection.close()


def _objects(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Name and SQL of everything but what SQLite and FTS5 keep for themselves."""
    rows = connection.execute("SELECT name, coalesce(sql, '') FROM sqlite_master").fetchall()
    return [(name, sql) for name, sql in rows if not str(name).startswith(("sqlite_", "adapter_fts_"))]


def _run(connection: sqlite3.Connection, script: str) -> None:
    """Run the statements one by one; ``executescript`` would commit first."""
    for statement in script.split(";\n"):
        if statement.strip():
            connection.execute(statement)
