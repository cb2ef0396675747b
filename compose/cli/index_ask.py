"""``compose index ls``, ``show`` and ``query``: what an index knows; without ``--encoder`` none imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compose.cli.console import note, print_facts, print_json, print_table, say
from compose.cli.index_options import (
    SCHEMA,
    SUMMARY_COLUMNS,
    BaseFilter,
    IndexPath,
    License,
    Rank,
    Score,
    Status,
    Task,
    filters,
    open_index,
    summary_json,
    summary_row,
)
from compose.cli.options import OUTPUT, Json

if TYPE_CHECKING:
    from compose.hub_index.records import AdapterRecord, EmbeddingRecord
    from compose.hub_index.search import Hit
    from compose.hub_index.store import Index

Limit = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many.", rich_help_panel=OUTPUT)
]
Top = Annotated[int, typer.Option("--top", "-k", metavar="N", min=1, help="At most so many.", rich_help_panel=OUTPUT)]
SHOWN_MODULES = 12


def ls(
    index: IndexPath = None,
    base: BaseFilter = None,
    task: Task = None,
    rank: Rank = None,
    license: License = None,
    score: Score = None,
    status: Status = "active",
    limit: Limit = None,
    json: Json = False,
) -> None:
    """List adapters by name."""
    from compose.hub_index.search import Filters

    with open_index(index) as opened:
        found = opened.ls(Filters(**filters(base, task, rank, license, score, status)), limit=limit)
    if json:
        print_json({"schema_version": SCHEMA, "adapters": [summary_json(one) for one in found]})
        return
    print_table(SUMMARY_COLUMNS, [summary_row(one) for one in found])
    say(f"{len(found)} adapters")


def show(
    name: Annotated[str, typer.Argument(help="An adapter's name, or its whole content hash.", show_default=False)],
    index: IndexPath = None,
    json: Json = False,
) -> None:
    """Show everything that is known of one adapter."""
    with open_index(index) as opened:
        record = opened.get(name)
    if json:
        print_json({"schema_version": SCHEMA, "adapter": summary_json(record)})
        return
    _show(record)


def query(  # noqa: PLR0913 - one parameter per option
    text: Annotated[str, typer.Argument(help="What the adapter should be about, in words.", show_default=False)],
    index: IndexPath = None,
    base: BaseFilter = None,
    task: Task = None,
    rank: Rank = None,
    license: License = None,
    score: Score = None,
    status: Status = "active",
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="NAME",
            help="Also rank by vectors of this encoder: minilm, or a sentence-transformers name or folder.",
        ),
    ] = None,
    by: Annotated[
        Literal["card", "examples"], typer.Option("--by", metavar="KIND", help="Which vectors: card or examples.")
    ] = "card",
    top: Top = 10,
    json: Json = False,
) -> None:
    """Find adapters by words, filters and, with --encoder, vectors; the best first.

    Words are ranked by full text (bm25), any of them counts. With --encoder both rankings are fused by their ranks;
    compose index embed makes the vectors.
    """
    asked = filters(base, task, rank, license, score, status)
    with open_index(index) as opened:
        vector = None if encoder is None else _vector(text, encoder, by)
        hits = opened.query(text, vector=vector, k=top, **asked)
        if encoder is None:
            _tell_of_vectors(opened)
    if json:
        adapters = [_hit_json(hit) for hit in hits]
        print_json({"schema_version": SCHEMA, "query": text, "encoder": encoder, "adapters": adapters})
        return
    if not hits:
        say("nothing found; fewer filters, other words, or --encoder may find more")
        return
    rows = [[f"{hit.score:.4g}", *summary_row(hit.adapter)] for hit in hits]
    print_table([">score", *SUMMARY_COLUMNS], rows)


def encoder_named(name: str) -> Any:
    """Return the encoder of ``--encoder``; ``minilm`` is the default one.

    Raises:
        ComposeError: There is none of this name, or its package is missing.
    """
    from compose.retriever.encoders import DEFAULT_MODEL, SentenceEncoder

    return SentenceEncoder(DEFAULT_MODEL if name == "minilm" else name)


def _vector(text: str, encoder: str, by: Literal["card", "examples"]) -> EmbeddingRecord:
    from compose.hub_index.embed import query_vector

    return query_vector(text, encoder_named(encoder), by)


def _tell_of_vectors(opened: Index) -> None:
    """Say on standard error that the index has vectors that were not asked for."""
    known = opened.info().encoders
    if known:
        names = ", ".join(dict.fromkeys(one.encoder_id for one in known))
        note(f"ranked by words alone; the index also has vectors ({names}): --encoder NAME ranks by both")


def _hit_json(hit: Hit) -> dict[str, Any]:
    return {"score": hit.score, "cosine": hit.cosine, "bm25": hit.bm25, **summary_json(hit.adapter)}


def _show(record: AdapterRecord) -> None:
    ranks = str(record.rank_max) if record.rank_min == record.rank_max else f"{record.rank_min}-{record.rank_max}"
    targets = [one for one in record.modules if one.kind != "full"]
    print_facts(
        {
            "adapter": record.name,
            "about": record.title or None,
            "summary": record.summary or None,
            "status": record.status,
            "base": f"{record.base_id or 'unknown'}{f' at {record.base_revision}' if record.base_revision else ''}",
            "fingerprint": record.base_fingerprint or None,
            "kind": ", ".join((record.peft_type, *record.flags)) or None,
            "targets": f"{len(targets)} modules, rank {ranks}" if targets else None,
            "scaling": ", ".join(f"{name}: {value:g}" for name, value in list(record.scaling.items())[:4]) or None,
            "size": f"{record.num_bytes:,} bytes, {record.num_params:,} parameters, {record.dtype}"
            if record.num_bytes
            else None,
            "folder": record.path or "none: known by description alone",
            "repository": f"{record.repo_id} at {record.revision}" if record.repo_id else None,
            "weights": f"sha256 {record.sha256_weights}" if record.sha256_weights else None,
            "identity": record.sha256,
            "licence": record.license or "not told",
            "language": ", ".join(record.language) or None,
            "tags": ", ".join(record.tags) or None,
            "trained on": ", ".join(record.datasets) or None,
            "examples": len(record.examples) or None,
            "vectors": ", ".join(f"{one.encoder_id} ({one.kind})" for one in record.embeddings) or None,
            "made of": ", ".join(f"{one.parent_sha256[:12]}" for one in record.parents) or None,
        }
    )
    for reason in record.reasons:
        say(f"{record.status}: {reason}")
    if record.scores:
        rows = [[one.task, one.split, one.metric, f"{one.value:g}", one.harness] for one in record.scores]
        print_table(["task", "split", "metric", ">value", "harness"], rows, title="Scores")
    if record.findings:
        found = [[one.rule, one.severity, one.detail] for one in record.findings]
        print_table(["rule", "severity", "finding"], found, title="Findings")
    shown = [[one.name, one.kind, f"{one.in_features} -> {one.out_features}", str(one.rank)] for one in record.modules]
    print_table(["module", "kind", "shape", ">rank"], shown[:SHOWN_MODULES], title="Modules")
    if len(shown) > SHOWN_MODULES:
        say(f"and {len(shown) - SHOWN_MODULES} more modules (--json has all)")
