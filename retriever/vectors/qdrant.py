"""``qdrant``: a Qdrant server, where adapters are shared between machines (extra ``qdrant``)."""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from compose.errors import (
    BackendUnavailableError,
    DuplicateNameError,
    IncompatibleError,
    UnknownNameError,
)
from compose.files.publish import publish_folder
from compose.retriever.vectors import VECTOR_BACKENDS, Hits, Payload
from compose.retriever.vectors.table import (
    FACTS_FILE,
    VERSION,
    check_k,
    check_payloads,
    check_rows,
    check_where,
    read_facts,
)

URL_VARIABLE = "QDRANT_URL"
KEY_VARIABLE = "QDRANT_API_KEY"
_NAMESPACE = uuid.UUID("6f0c9b0e-5d6b-4c2b-9a52-9d0d3f6a7d11")
"""Of the point ids, which Qdrant wants as UUIDs; they follow from our ids."""
_BATCH = 256


@VECTOR_BACKENDS.register("qdrant")
class QdrantVectors:
    """One collection of a server, cosine distance, payload filters inside the search.

    The server owns durability: `persist` writes where the collection is, never its vectors or the key. Searches are
    exact or approximate as the server decides (HNSW above its own threshold).

    The in-process mode of qdrant-client keeps vectors in Python lists and searches them all; it is no server, and is
    refused unless ``allow_local`` says that a test of this protocol is running.

    Args:
        dim: ``D``.
        collection: Its name; made where it does not exist.
        client: A ``QdrantClient``; None: of the server at ``QDRANT_URL``, with the key in ``QDRANT_API_KEY``.
        allow_local: Accept a client without a server.

    Raises:
        BackendUnavailableError: qdrant-client is not installed, no server is named, or the client is a local one.
        IncompatibleError: The collection has another width or distance.
    """

    summary: ClassVar[str] = "a server, for many machines"

    def __init__(
        self, dim: int, *, collection: str = "compose", client: Any = None, allow_local: bool = False
    ) -> None:
        if importlib.util.find_spec("qdrant_client") is None:
            raise BackendUnavailableError(
                "vector backend 'qdrant' needs qdrant-client: pip install 'adapter-compose[qdrant]'"
            )
        self._client = connect() if client is None else client
        if is_local(self._client) and not allow_local:
            raise BackendUnavailableError(
                "qdrant-client's in-process mode is no server (every search reads all vectors in Python); start a "
                f"server and set {URL_VARIABLE}, or use 'numpy' or 'faiss'"
            )
        self.collection = collection
        self.dim = dim
        self._open()

    def __len__(self) -> int:
        return int(self._client.count(self.collection, exact=True).count)

    def add(self, ids: Sequence[str], vectors: np.ndarray, payloads: Sequence[Payload] | None = None) -> None:
        """Add unit rows, in batches of 256 requests; of a call that fails half-way earlier batches stay."""
        from qdrant_client import models

        rows = check_rows(vectors, self.dim, "vectors")
        given = check_payloads(ids, rows, payloads)
        taken = sorted(self._present(ids))
        if taken or len(set(ids)) != len(ids):
            raise DuplicateNameError(f"ids are taken or given twice: {taken[:5]}; delete them first")
        order = len(self)
        points = [
            models.PointStruct(
                id=point_id(id_), vector=row.tolist(), payload={"id": id_, "order": order + n, "fields": dict(payload)}
            )
            for n, (id_, row, payload) in enumerate(zip(ids, rows, given, strict=True))
        ]
        for start in range(0, len(points), _BATCH):
            self._client.upsert(self.collection, points[start : start + _BATCH], wait=True)

    def search(self, queries: np.ndarray, k: int, where: Payload | None = None) -> Hits:
        """Return the ``k`` closest vectors of every query."""
        from qdrant_client import models

        unit = check_rows(queries, self.dim, "queries")
        limit = min(check_k(k), max(1, len(self)))
        condition = _condition(where)
        requests = [
            models.QueryRequest(query=row.tolist(), limit=limit, filter=condition, with_payload=["id"]) for row in unit
        ]
        answers = self._client.query_batch_points(self.collection, requests) if requests else []
        ids = tuple(tuple(point.payload["id"] for point in answer.points) for answer in answers)
        scores = np.full((len(unit), max(map(len, ids), default=0)), -np.inf, np.float32)
        for line, answer in zip(scores, answers, strict=True):
            line[: len(answer.points)] = [point.score for point in answer.points]
        return Hits(ids, scores)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove vectors."""
        from qdrant_client import models

        unknown = sorted(set(ids) - self._present(ids))
        if unknown:
            raise UnknownNameError(f"unknown ids {unknown[:5]}; nothing was deleted")
        if ids:
            points = models.PointIdsList(points=[point_id(id_) for id_ in ids])
            self._client.delete(self.collection, points, wait=True)

    def filter(self, where: Payload) -> tuple[str, ...]:
        """Return the ids whose payload has these values, in the order in which they were added."""
        found: list[tuple[int, str]] = []
        offset = None
        while True:
            points, offset = self._client.scroll(
                self.collection, scroll_filter=_condition(where), limit=_BATCH, offset=offset,
                with_payload=["id", "order"],
            )  # fmt: skip
            found += [(point.payload["order"], point.payload["id"]) for point in points]
            if offset is None:
                return tuple(id_ for _, id_ in sorted(found))

    def persist(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the collection's name and width; the vectors are on the server."""
        facts = {
            "version": VERSION, "backend": "qdrant", "dim": self.dim, "options": {"collection": self.collection},
            "ids": [], "payloads": [],
        }  # fmt: skip
        return publish_folder({FACTS_FILE: json.dumps(facts).encode()}, Path(folder), overwrite=overwrite)

    @classmethod
    def restore(cls, folder: Path, *, client: Any = None, allow_local: bool = False) -> QdrantVectors:
        """Connect to the collection that ``folder`` names.

        Raises:
            IncompatibleError: It is not on this server.
        """
        facts = read_facts(folder)
        collection = str(facts["options"].get("collection"))
        chosen = connect() if client is None else client
        if not chosen.collection_exists(collection):
            raise IncompatibleError(f"{folder}: this Qdrant server has no collection {collection!r}")
        return cls(facts["dim"], collection=collection, client=chosen, allow_local=allow_local)

    def _open(self) -> None:
        from qdrant_client import models

        if not self._client.collection_exists(self.collection):
            vectors = models.VectorParams(size=self.dim, distance=models.Distance.COSINE)
            self._client.create_collection(self.collection, vectors_config=vectors)
            return
        found = self._client.get_collection(self.collection).config.params.vectors
        if not isinstance(found, models.VectorParams) or (found.size, found.distance) != (
            self.dim,
            models.Distance.COSINE,
        ):
            raise IncompatibleError(
                f"collection {self.collection!r} holds {found!r:.200}, wanted {self.dim} entries and cosine distance; "
                "choose another collection"
            )

    def _present(self, ids: Sequence[str]) -> set[str]:
        names = {point_id(id_): id_ for id_ in ids}
        points = self._client.retrieve(self.collection, list(names), with_payload=False) if names else []
        return {names[str(point.id)] for point in points}


def connect() -> Any:
    """Return a client of the server that the environment names.

    Raises:
        BackendUnavailableError: It names none.
    """
    from qdrant_client import QdrantClient

    url = os.environ.get(URL_VARIABLE)
    if not url:
        raise BackendUnavailableError(
            f"vector backend 'qdrant' needs a server: set {URL_VARIABLE} (and {KEY_VARIABLE}), or pass client="
        )
    return QdrantClient(url=url, api_key=os.environ.get(KEY_VARIABLE))


def is_local(client: Any) -> bool:
    """Whether a client runs in this process, without a server."""
    return type(getattr(client, "_client", client)).__name__ in ("QdrantLocal", "AsyncQdrantLocal")


def point_id(id_: str) -> str:
    """Return the UUID under which an id is stored."""
    return str(uuid.uuid5(_NAMESPACE, id_))


def _condition(where: Payload | None) -> Any:
    from qdrant_client import models

    if not where:
        return None
    return models.Filter(
        must=[
            models.FieldCondition(key=f"fields.{field}", match=models.MatchValue(value=value))
            for field, value in check_where(where).items()
        ]
    )
