"""Vectors of adapters for queries: of what their cards say, or of their examples, under one encoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from compose.errors import HubIndexError
from compose.hub_index.records import AdapterRecord, EmbeddingRecord
from compose.hub_index.search import Filters

if TYPE_CHECKING:
    import numpy as np

    from compose.hub_index.store import Index

EmbeddedKind = Literal["card", "examples"]
BLOCK = 256
"""Adapters embedded and written in one transaction."""
_SEPARATORS = re.compile(r"[._-]+")


class Encoder(Protocol):
    """What is asked of an encoder; `compose.retriever.encoders` has them."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> str: ...  # noqa: D102
    def encode(self, texts: Sequence[str]) -> np.ndarray: ...  # noqa: D102


class Embedded(NamedTuple):
    """What `embed` did.

    Attributes:
        written: Names that have a vector now and had none.
        kept: Names that had one already.
        without: Names there is nothing to embed of: no examples.
    """

    written: tuple[str, ...]
    kept: tuple[str, ...]
    without: tuple[str, ...]


def embed(
    index: Index, encoder: Encoder, kind: EmbeddedKind = "card", *, again: bool = False, status: str = "any"
) -> Embedded:
    """Give adapters a vector each.

    ``"card"`` embeds title, name, summary, tags and data sets as one text. ``"examples"`` embeds every example's input
    and takes the mean of the unit vectors, scaled to length 1 (LoraRetriever's paper, arXiv:2402.09997, which says
    cosine; its code leaves the mean as it is, which is worse: spec/search.md 3.1).

    Args:
        index: Open for writing.
        encoder: Texts to unit vectors.
        kind: What is embedded.
        again: Also adapters that have such a vector.
        status: Of the adapters; ``"any"`` leaves removed ones out.

    Raises:
        HubIndexError: The index has vectors of this encoder and kind that another hash or prompt made.
    """
    written, kept, without, waiting = [], [], [], list[AdapterRecord]()
    for record in index.records(Filters(status=status)):
        if record.status == "removed":
            continue
        if not again and any((one.encoder_id, one.kind) == (encoder.id, kind) for one in record.embeddings):
            kept.append(record.name)
        elif not _texts(record, kind):
            without.append(record.name)
        else:
            waiting.append(record)
    for start in range(0, len(waiting), BLOCK):
        block = waiting[start : start + BLOCK]
        index.put_embeddings({record.name: [vector] for record, vector in _vectors(block, encoder, kind)})
        written += [record.name for record in block]
    return Embedded(tuple(written), tuple(kept), tuple(without))


def query_vector(text: str, encoder: Encoder, kind: EmbeddedKind = "card") -> EmbeddingRecord:
    """Return a text as the vector of a query, to be compared with adapters' vectors of ``kind``.

    Raises:
        HubIndexError: An empty text.
    """
    if not text.strip():
        raise HubIndexError("an empty text has no direction; give words, or leave --encoder out")
    return _record(encoder.encode([text])[0], encoder, kind)


def card_text(record: AdapterRecord) -> str:
    """Return what is embedded of a card: its fields in one text, the name in words."""
    name = _SEPARATORS.sub(" ", record.name)
    title = record.title or name
    more = [", ".join(one for one in listed if ":" not in one) for listed in (record.tags, record.datasets)]
    parts = [title, name if name.lower() not in title.lower() else "", record.summary, *more]
    return ". ".join(part.rstrip(". ") for part in parts if part)


def _texts(record: AdapterRecord, kind: EmbeddedKind) -> list[str]:
    return [card_text(record)] if kind == "card" else [one.input for one in record.examples]


def _vectors(
    records: Sequence[AdapterRecord], encoder: Encoder, kind: EmbeddedKind
) -> list[tuple[AdapterRecord, EmbeddingRecord]]:
    """Embed the texts of all records in one call and return each record's mean direction."""
    texts = [_texts(record, kind) for record in records]
    rows = encoder.encode([text for listed in texts for text in listed])
    found, at = [], 0
    for record, listed in zip(records, texts, strict=True):
        mean = rows[at : at + len(listed)].astype("float64").mean(axis=0)
        at += len(listed)
        found.append((record, _record(mean / (mean @ mean) ** 0.5, encoder, kind)))
    return found


def _record(vector: np.ndarray, encoder: Encoder, kind: EmbeddedKind) -> EmbeddingRecord:
    return EmbeddingRecord.from_array(
        vector, encoder_id=encoder.id, encoder_sha256=encoder.fingerprint, prompt=encoder.prompt, kind=kind
    )
